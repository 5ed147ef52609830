"""Networks as a library's own parser reads a graph: tensors, and layers with the types they make.

An engine says the same of itself only where it can be loaded, on its GPU.
"""

from collections import Counter
from dataclasses import dataclass

from advmoe_deploy.runtime.tensorrt.api import INetworkDefinition, ITensor


@dataclass(frozen=True)
class NetworkTensor:
    """The type of a tensor, in TensorRT's words, and its shape, -1 where that follows the batch."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Network that a parser made of a graph.

    ``made`` has every tensor that a layer makes, by name; ``kinds`` how many layers there are of
    each of TensorRT's kinds.
    """

    inputs: dict[str, NetworkTensor]
    outputs: dict[str, NetworkTensor]
    made: dict[str, NetworkTensor]
    kinds: Counter[str]


def describe(network: INetworkDefinition) -> Network:
    """Return what a network that was read is made of."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    made = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
    return Network(
        inputs={tensor.name: _tensor(tensor) for tensor in inputs},
        outputs={tensor.name: _tensor(tensor) for tensor in outputs},
        made={tensor.name: _tensor(tensor) for tensor in made},
        kinds=Counter(layer.type.name for layer in layers),
    )


def _tensor(tensor: ITensor) -> NetworkTensor:
    return NetworkTensor(tensor.dtype.name, tuple(tensor.shape))
