"""`python -m vlmjax` lists the commands."""

COMMANDS = {
    "main": "train a recipe         --config=configs/quickstart.py --workdir=runs/quickstart",
    "evaluate": "score a trained model  --model=runs/quickstart --benchmark=zeroshot --data=scenes:heldout",
    "export": "write a Hugging Face folder  --workdir=runs/quickstart --out=hf",
}


def main() -> None:
    """Print one line per command."""
    print("vlmjax: vision-language pretraining in JAX. Commands (each explains itself with --help):\n")
    for name, use in COMMANDS.items():
        print(f"  python -m vlmjax.{name:<9} {use}")


if __name__ == "__main__":
    main()
