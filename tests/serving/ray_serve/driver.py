"""Program that deploys on a Ray of its own until its input ends; it says what became of it.

    python driver.py BUNDLE PORT GRPC_PORT FOLDER SETTINGS [DAMAGED]

``DAMAGED`` is a file in which a byte changes once the application was built, before it is deployed.
"""

import json
import sys
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema

from advmoe_deploy.errors import AdvMoEError
from advmoe_deploy.serving.ray_serve.app import application

bundle, port, grpc_port, folder, settings, *damaged = sys.argv[1:]
SERVICE = "advmoe_deploy.serving.ray_serve.grpc.add_service"


def said(value: dict[str, object]) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


ray.init(
    num_cpus=4,  # more than there may be: replicas ask for quarters
    include_dashboard=False,
    object_store_memory=100 << 20,
    _temp_dir=folder,
    log_to_driver=False,
    logging_level="ERROR",
)
try:
    for wrong in ({"deployments": {"rooter": {}}}, {"deployments": {"router": {"replicas": 2}}}):
        try:
            application(bundle, **wrong)
        except AdvMoEError as error:
            said({"refused": str(error)})
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(port)},
        grpc_options={"port": int(grpc_port), "grpc_servicer_functions": [SERVICE]},
    )
    app = application(bundle, **json.loads(settings))
    for file in map(Path, damaged):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        serve.run(app)
    except RuntimeError as error:
        said({"failed": str(error)})
    (status,) = serve.status().applications.values()
    replicas = {name: each.replica_states for name, each in status.deployments.items()}
    messages = [each.message for each in status.deployments.values()]
    said({"status": status.status, "replicas": replicas, "messages": messages})
    import yaml

    file = Path(__file__).parents[3] / "deploy" / "ray-serve.yaml"
    ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    sys.stdin.read()
finally:
    serve.shutdown()
    ray.shutdown()
