"""Messages of the Open Inference Protocol: every field has one type, and null means absent."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from advmoe_deploy.serving.online.http.json_data import JsonError

_MEMBERS = 64  # of an object, more than any client sends


def _unicode(value: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("Input should be Unicode text, without lone surrogates")
    return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | bool | int | float):
        raise ValueError("Input should be a string, a number or a boolean")
    return value


Text = Annotated[StrictStr, AfterValidator(_unicode)]


class _Object(BaseModel):
    """A JSON object of few members, the null ones of which count as absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > _MEMBERS:  # each would be judged, before the first fault is told
            raise ValueError(f"Input should have at most {_MEMBERS} members")
        return {key: item for key, item in value.items() if item is not None}


class _Parameters(_Object):
    """Parameters; those of extensions that are not ours are scalars, and ignored."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_scalar)]]


class MessageParameters(_Parameters):
    """Parameters of a request; ``timeout`` in microseconds, as Triton's, 0 for none."""

    binary_data_output: StrictBool = False
    timeout: Annotated[StrictInt, Field(ge=0, lt=1 << 64)] | None = None


class TensorParameters(_Parameters):
    """Parameters of an input."""

    binary_data_size: StrictInt | None = None


class OutputParameters(_Parameters):
    """Parameters of a requested output."""

    binary_data: StrictBool | None = None
    classification: StrictInt | None = None


class Tensor(_Object):
    """An input; its ``data`` are read apart."""

    name: Text
    shape: Annotated[list[StrictInt], FailFast()]
    datatype: Text
    parameters: TensorParameters = TensorParameters()
    data: Any = None


class RequestedOutput(_Object):
    """An output that a request names."""

    name: Text
    parameters: OutputParameters = OutputParameters()


class Message(_Object):
    """An inference request."""

    id: Text | None = None
    parameters: MessageParameters = MessageParameters()
    inputs: Annotated[list[Tensor], FailFast(), Field(max_length=16)]
    outputs: Annotated[list[RequestedOutput], FailFast(), Field(max_length=256)] = []


def message_from_json(value: object) -> Message:
    """Return the request that a JSON ``value`` is.

    Raises:
        JsonError: a field is missing or of another type; the message names the first one.
    """
    try:
        return Message.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"])) or "the request"
        message = first["msg"].removeprefix("Value error, ")
        raise JsonError(f"{field}: {message}") from None
