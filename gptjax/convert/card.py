"""Write the model card of an export from the run's directory."""

import json
from pathlib import Path
from typing import Any

from gptjax.convert.models import Model
from gptjax.nn.transformer import count_params


def model_card(model: Model, family: str, dtype: str) -> str:
    """Return a model card: Markdown with the front matter that the Hugging Face hub reads."""
    config, size = model.meta.get("config", {}), count_params(model.config)["total"]
    name = model.path.resolve().name
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gptjax", "---"]
    shape = (
        f"{size:,} parameters; {model.config.n_layers} layers of width {model.config.d_model}, "
        f"context of {model.config.context_length} tokens, vocabulary of {model.config.vocab_size} "
        f"({_TOKENIZERS[model.tokenizer.kind]})."
    )
    lines = [
        *front,
        f"# {name}",
        f"A {family}-form language model, written by `gptjax convert to-hf` in {dtype}. {shape}",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # path of this folder\n'
        "tokenizer, model = (c.from_pretrained(folder) for c in (AutoTokenizer, AutoModelForCausalLM))\n```",
        "## Training",
        *_training(model, config),
        "## Limits",
        "A language model continues text; it may be wrong, and it repeats the biases of its data. It has been "
        "evaluated only by the losses above. Attention is trained up to the context length; beyond it, quality is "
        "unknown." + _CHAR_LIMIT * (model.tokenizer.kind == "char"),
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(lines[len(front) :]) + "\n"


_TOKENIZERS = {
    "byte": "UTF-8 bytes",
    "char": "one id a character",
    "hf": "the tokenizer in this folder",
    "marked": "the tokenizer in this folder, of text with tags or pictures",
    "tiktoken": "a byte-level BPE of OpenAI's, in this folder",
    "none": "no tokenizer",
}
_CHAR_LIMIT = " The tokenizer knows only the characters of its corpus: `AutoTokenizer` drops others silently."


def _training(model: Model, config: dict[str, Any]) -> list[str]:
    last = _last_metrics(model.path / "metrics.jsonl", model.meta.get("step", 0))
    if not last:
        return ["Imported, not trained here: see the original model's card for data and recipe."]
    data, optim, train = config["data"], config["optim"], config["train"]
    start = f" It started from the weights of `{config['init_from']}`." if config.get("init_from") else ""
    tokens = f"{int(last['tokens']):,} tokens in {int(last['step']):,} steps" if "tokens" in last else "some steps"
    names = {
        "train/loss": "training loss, nats a token",
        "val/loss": "validation loss, nats a token",
        "val/bpb": "validation loss, bits a byte",
    }
    table = [f"| {title} | {last[key]:.4f} |" for key, title in names.items() if key in last]
    return [
        f"- **Data**: `{data['path']}`; the last {data['val_frac']:.0%} of its tokens are held out.{start}\n"
        f"- **Recipe**: {tokens}, {train['batch_sequences']} sequences a step; {optim['name']}, peak learning rate "
        f"{optim['peak_lr']}, {optim['schedule']} schedule, weight decay {optim['weight_decay']}, seed "
        f"{config['seed']}.",
        "\n".join(["| measured last | |", "|---|---|", *table]),
    ]


def _last_metrics(path: Path, step: int) -> dict[str, float]:
    """Return the last value of every metric up to a step; empty where there is no such file."""
    last: dict[str, float] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            last |= row if row["step"] <= step else {}
    return last
