"""`python -m vlmjax` lists the commands."""

COMMANDS = {
    "main": "train a recipe         --config=configs/quickstart.py --workdir=runs/quickstart",
    "plan": "compile for other devices  --config=configs/clip_vitl.py --topology=v5e:16x16",
    "evaluate": "score a trained model  --model=runs/quickstart --benchmark=zeroshot --data=scenes:heldout:class",
    "generate": "text from a model      --model=FOLDER --image=a.jpg --prompt='What is this?'",
    "instruct": "write conversations    scenes --out=talk.jsonl --endpoint=URL --model=NAME",
    "capfilt": "better captions        filter SHARDS --out=DIR --model=FOLDER",
    "export": "write a Hugging Face folder  --workdir=runs/quickstart --out=hf",
    "checkpoint": "verify, diff, average  verify runs/quickstart",
    "wiseft": "average with zero-shot  --workdir=runs/finetune --alphas=0,0.5,1",
    "data.stats": "what a source holds    scenes:heldout --limit=200",
    "data.inspect": "a step's rows, a page  --config=configs/quickstart.py --out=step.html",
    "data.scenes": "draw the scenes        --sheet=scenes.png",
    "data.formats.tfds_coco": "COCO captions as TFDS  --coco=DIR --out=DIR",
    "data.index": "index shards           shards/*.tar",
    "data.convert": "write shards           pairs.jsonl --out=shards",
    "hub.llama2c": "llama2.c's models to HF  stories260K.bin tok512.bin runs/stories",
    "evals.caption": "score captions as COCO does  REFERENCES.json RESULTS.json",
    "data.bench": "time the pipeline      scenes --image_size=64",
}


def main() -> None:
    """Print one line per command."""
    print("vlmjax: vision-language pretraining in JAX. Commands (each explains itself with --help):\n")
    for name, use in COMMANDS.items():
        print(f"  python -m vlmjax.{name:<22} {use}")


if __name__ == "__main__":
    main()
