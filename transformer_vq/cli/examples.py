"""What stands at the end of every command's help: lines that run as they are, by command; `""` is the program itself.

`runs/tiny` is what the first of them leaves; book.txt, pictures/ and names on the hub are the reader's own. Lines have
at most 78 characters, so that a terminal of 80 columns breaks none.
"""

from __future__ import annotations

from rich.markup import escape

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "transformer-vq train lm/tiny",
        "transformer-vq generate runs/tiny --prompt 'def '",
        "transformer-vq inspect runs/tiny",
    ),
    "train": (
        "transformer-vq train lm/tiny",
        "transformer-vq train lm/tiny data.source=book.txt run_dir=runs/book",
        "transformer-vq train runs/tiny --resume train.steps=300",
    ),
    "eval": (
        "transformer-vq eval runs/tiny --split test",
        "transformer-vq eval runs/tiny@best --context full --context 128",
    ),
    "length": (
        "transformer-vq length runs/tiny --times 4 --plot positions.png",
        "transformer-vq length runs/tiny --data book.txt --texts 2",
    ),
    "inspect": (
        "transformer-vq inspect runs/tiny",
        "transformer-vq inspect runs/tiny book.txt --out book.html --plot book.png",
    ),
    "generate": (
        "transformer-vq generate runs/tiny --prompt 'def ' --tokens 300",
        "transformer-vq generate runs/tiny --prompt-file book.txt --top-p 0.9 --json",
        "transformer-vq generate runs/tiny --temperature 0 --stop '\\n\\n'",
    ),
    "describe": (
        "transformer-vq describe lm/enwik8",
        "transformer-vq describe lm/tiny model.quantizer.codes=1024",
    ),
    "doctor": (
        "transformer-vq doctor lm/tiny model.quantizer.estimator=rotation",
        "transformer-vq doctor runs/tiny --strict",
        "transformer-vq doctor runs/tiny --gradient --keys 16 --plot gradients.png",
    ),
    "plot": ("transformer-vq plot runs/tiny",),
    "data": (
        "transformer-vq data lm/tiny",
        "transformer-vq data lm/tiny data.source=book.txt data.tokenizer=bpe:512",
    ),
    "convert": (
        "transformer-vq convert checkpoint_1000/ runs/paper --config lm/enwik8",
        "transformer-vq convert runs/paper out.npz",
    ),
    "export": ("transformer-vq export runs/tiny tiny-hf",),
    "import": (
        "transformer-vq import tiny-hf runs/back",
        "transformer-vq import tiny-hf runs/other data.source=book.txt",
    ),
    "adopt": (
        "transformer-vq adopt HuggingFaceTB/SmolLM2-135M runs/smol --tokens 200000",
        "transformer-vq adopt llama/ runs/llama data.source=book.txt model.window=32",
    ),
    "images": (
        "transformer-vq images images/tiny",
        "transformer-vq images images/tiny data.source=pictures/ run_dir=runs/mine",
    ),
    "encode": ("transformer-vq encode runs/images-tiny pictures/",),
    "decode": ("transformer-vq decode runs/images-tiny runs/images-tiny/codes/pictures.npz",),
    "study": (
        "transformer-vq study plan studies/estimators-tiny",
        "transformer-vq study run studies/estimators-tiny --jobs 2",
    ),
    "study plan": (
        "transformer-vq study plan studies/estimators-tiny",
        "transformer-vq study plan studies/language-models --no-trial --jobs 2",
    ),
    "study run": (
        "transformer-vq study run studies/estimators-tiny --jobs 2",
        "transformer-vq study run studies/recall seeds=[0,1] --dry-run",
    ),
    "study report": ("transformer-vq study report studies/estimators-tiny",),
    "bench": (
        "transformer-vq bench attention",
        "transformer-vq bench all --page speed.md",
    ),
    "bench attention": (
        "transformer-vq bench attention",
        "transformer-vq bench attention --length 512 --length 2048 --plot speed.png",
    ),
    "bench quantize": ("transformer-vq bench quantize --repeats 5 --out quantize.json",),
    "bench images": ("transformer-vq bench images --json",),
    "bench generation": ("transformer-vq bench generation --position 256 --position 1024",),
    "bench train": ("transformer-vq bench train --length 512 --repeats 3",),
    "bench scaling": ("transformer-vq bench scaling --model 1.3B --length 1048576 --gpus 64",),
    "bench communication": ("transformer-vq bench communication --length 8192 --processes 4",),
    "bench context": ("transformer-vq bench context --length 32768 --processes 2 --repeats 3",),
    "bench all": (
        "transformer-vq bench all --page speed.md",
        "transformer-vq bench all --page speed.md --section attention --again",
    ),
}


def epilog(command: str) -> str:
    """The end of a command's help."""
    lines = EXAMPLES[command]
    return escape("\n".join(["Example:" if len(lines) == 1 else "Examples:", *lines]))
