"""Examples at the end of each command's --help."""

EXAMPLES = {
    "train": (
        "advmoe train digits-advmoe",
        "advmoe train advmoe --data photos/",
        "advmoe train advmoe --data photos/ --dry-run",
        "advmoe train advmoe --data photos/ --from zoo:cifar10-advmoe",
        "advmoe train dense --data photos/ --epochs 20 --image-size 64 --epsilon 4/255",
        "advmoe train cifar10-resnet18-advmoe --data cifar10:/data/cifar10 --out runs/c10 --resume",
        "advmoe train digits-advmoe --set epochs=5 --set model.num_experts=4 --out runs/four",
    ),
    "show": (
        "advmoe show digits-advmoe",
        "advmoe show cifar10-advmoe-cpu --set epochs=30 --json",
    ),
    "sweep": (
        "advmoe sweep digits-advmoe --over model.num_experts=2,4,8",
        "advmoe sweep digits-advmoe --over model.ratio=0.25,0.5,0.75 --seeds 0,1,2",
    ),
    "import": (
        "advmoe import best.pth --from advmoe",
        "advmoe import best.pth --from advmoe --classes names.txt --data photos/ --epsilon 8/255",
        "advmoe import last.ckpt --from robust-experts --set top_k=2 --out runs/conv-experts",
        "advmoe import ckpt.t7 --from dual-model --set alpha=0.7 --set mean=0.49,0.48,0.45",
        "advmoe import last.ckpt --from advmoe --key ema_model",
    ),
    "export": (
        "advmoe export runs/digits-advmoe",
        "advmoe export runs/photos-advmoe --precision int8",
        "advmoe export zoo:NAME --precision int8 --least-route-agreement 0.9",
        "advmoe export runs/digits-advmoe --format onnx --out bundle --no-reference",
        "advmoe export runs/digits-advmoe --format trt --precision fp16 --onnx-only",
        "advmoe export bundle --format trt --out bundle-for-this-gpu",
        "advmoe export zoo:NAME --format onnx",
        "advmoe export bundle --format triton --out models --mount /models",
        "advmoe export bundle --format web --out site",
        "advmoe export bundle --format kserve --storage-uri s3://models/cats --image HOST/advmoe:1",
    ),
    "eval": (
        "advmoe eval runs/digits-advmoe",
        "advmoe eval bundle --engine openvino:int8 --images 500 --report accuracy.html",
        "advmoe eval zoo:NAME --data cifar10:/data/cifar10 --json",
    ),
    "verify": (
        "advmoe verify runs/digits-advmoe/bundle",
        "advmoe verify bundle --attacks standard --max-drop 0.2 --json",
        "advmoe verify bundle --data photos/ --epsilon 8/255",
        "advmoe verify bundle --images 20 --allow-fragile",
        "advmoe verify bundle --save-examples examples.npz",
        "advmoe verify bundle --attacks full --budget 30m --resume state.npz",
    ),
    "report": (
        "advmoe report bundle",
        "advmoe report bundle --attacks standard --engine onnxruntime --engine openvino --out page",
    ),
    "gate": (
        "advmoe gate bundle --against kept/report.json",
        "advmoe gate bundle --against kept/report.json --junit gate.xml --markdown gate.md",
    ),
    "profile": (
        "advmoe profile runs/digits-advmoe/bundle",
        "advmoe profile bundle --batch 1,64 --against dense,unfused --threads 2 --out latency.json",
        "advmoe profile bundle --engine onnxruntime --engine openvino --html latency.html",
    ),
    "benchmark": (
        "advmoe benchmark bundle",
        "advmoe benchmark bundle --aim throughput --images 1000 --json",
        "advmoe benchmark bundle --attacks quick --images 50",
    ),
    "analyze": (
        "advmoe analyze runs/digits-advmoe",
        "advmoe analyze bundle --budget 2m",
        "advmoe analyze bundle --only routes,experts --images 500 --steps 50 --out report",
        "advmoe analyze runs/digits-vit-moe --radii 1/255,4/255,20/255 --twin runs/digits-vit",
        "advmoe analyze runs/digits-vit-moe --only capacity --capacity 0.5,1,2 --out room",
        "advmoe analyze runs/digits-dense --smoothing 1000 --sigma 0.25",
        "advmoe analyze --dissect runs/standard runs/robust-router runs/robust-experts "
        "runs/experts-moved",
        "advmoe analyze --alpha 0.5..1 runs/digits-jtdmoe runs/digits-rt-er",
    ),
    "serve": (
        "advmoe serve bundle --port 8000",
        "advmoe serve bundle --grpc-port 8001",
        "advmoe serve bundle --host 0.0.0.0 --token-file token",
        "advmoe serve cats:1=old cats:2=new",
        "advmoe serve bundle --require-signature key.pub",
    ),
    "sign": ("advmoe sign bundle --key key.pem",),
    "predict": (
        "advmoe predict bundle photo.jpg",
        "advmoe predict bundle photos/ --output answers.csv",
        "advmoe predict bundle photos/ --output - | jq .label",
        "advmoe predict bundle --input 'photos/**/*.png' --output answers.parquet --top-k 3",
        "advmoe predict bundle --input 'shards/*.tar' --output answers.parquet --max-errors 100",
        "advmoe predict bundle --input test-00000-of-00001.parquet --output answers.jsonl",
        "find photos -name '*.jpg' | advmoe predict bundle --input - --output answers.jsonl",
        "advmoe predict bundle --input list.txt --output answers.jsonl --resume",
        "RAY_ADDRESS=head:6379 advmoe predict bundle --input '/d/*.tar' --output a.jsonl --on ray",
    ),
    "inspect": ("advmoe inspect bundle", "advmoe inspect hub:USER/NAME --json"),
    "list": (
        "advmoe list",
        "advmoe list recipes --data cifar10 --family advmoe",
        "advmoe list models --json",
    ),
    "add": (
        "advmoe add runs/digits-advmoe --name my-digits",
        "advmoe add runs/c10 --name c10 --fp16 --results report/report.json --license apache-2.0",
    ),
    "push": (
        "advmoe push zoo:c10 --to USER/NAME --license apache-2.0 --dry-run",
        "advmoe push bundle --to USER/NAME --private",
    ),
    "demo": ("advmoe demo", "advmoe demo --quick --out /tmp/demo"),
    "doctor": ("advmoe doctor",),
}


def epilog(command: str) -> str:
    """Return the end of the help of ``command``, in lines that stay as they are."""
    # To the parser, a backspace means: do not join the lines of this paragraph.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])
