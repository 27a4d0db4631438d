"""Held-out evaluation of a student: loss, acceptance by the teacher, distinct openers, subjects named.

    python -m ulm.evaluate --gguf TEACHER.gguf --eval EVAL.jsonl model/ [more folders]

Openers are greedy, up to eight words. The teacher judges them as the continuator's likelihood verifier does: by the log-probability of
their tokens in the plain-dialogue layout. *Accepted*: the worst token and the mean are both above what 95 % of the teacher's own openers
reach. The teacher's own openers are the upper bound, one constant opener the lower.
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from .llama import Cache, Config, Llama
from .teacher import DIALOGUE, Teacher
from .train import ASSISTANT, USER

CONSTANT = "That is a good question, let me think"


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    model = Llama(Config(raw["vocab_size"], raw["hidden_size"], raw["num_hidden_layers"], raw["num_attention_heads"],
                         raw["num_key_value_heads"], raw["intermediate_size"], theta, raw["rms_norm_eps"]))
    model.load_hugging_face(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def eight_words(text: str) -> str:
    return " ".join(text.split()[:8])


@torch.inference_mode()
def openers(model: Llama, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    out = []
    for question in questions:
        ids = tokenizer.encode(USER + question + ASSISTANT, add_special_tokens=False).ids
        cache, said = Cache(), []
        hidden = model.hidden(torch.tensor([ids]), cache)
        while len(said) < 24:
            token = model.logits(hidden[:, -1])[0].argmax().item()
            if token <= 2:
                break
            said.append(token)
            if len(tokenizer.decode(said).split()) > 8 or "\n" in tokenizer.decode(said):
                break
            hidden = model.hidden(torch.tensor([[token]]), cache, torch.tensor([len(ids) + len(said) - 1]))
        out.append(eight_words(tokenizer.decode(said).split("\n")[0]))
    return out


@torch.inference_mode()
def loss_on_first_tokens(model: Llama, tokenizer: Tokenizer, rows: list[dict], count: int = 10) -> float:
    total, n = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode(USER + row["question"] + ASSISTANT, add_special_tokens=False).ids
        answer = tokenizer.encode(row["opener"], add_special_tokens=False).ids[:count]
        logits = model.logits(model.hidden(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]).float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        n += len(answer)
    return total / n


@torch.inference_mode()
def judge(teacher: Teacher, prefix, questions: list[str], said: list[str]) -> list[tuple[float, float]]:
    """(mean, worst) log-probability of each opener's tokens; an empty opener gets the worst."""
    shared, offset = prefix
    out = []
    for question, opener in zip(questions, said):
        prompt, answer = teacher.ids(f"User: {question}\nAssistant:"), teacher.ids(" " + opener) if opener else []
        if not answer:
            out.append((-99.0, -99.0))
            continue
        ids = prompt + answer
        length = len(ids)
        mask = torch.cat((torch.ones(length, offset, dtype=torch.bool), torch.ones(length, length, dtype=torch.bool).tril()), 1)
        hidden = teacher.model.hidden(torch.tensor([ids]), Cache(shared), torch.arange(offset, offset + length), mask[None, None])
        logp = torch.log_softmax(teacher.model.logits(hidden[0, len(prompt) - 1:-1]).float(), -1)
        logp = logp.gather(1, torch.tensor(answer)[:, None])[:, 0]
        out.append((logp.mean().item(), logp.min().item()))
    return out


def names_subject(question: str, opener: str) -> bool:
    """Whether the opener has one of the question's longer words."""
    words = lambda text: {w for w in re.findall(r"[a-z]+", text.lower()) if len(w) > 3}  # noqa: E731
    return bool(words(question) & words(opener))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True, help="JSON lines with `question` and `opener`")
    parser.add_argument("--count", type=int, default=460)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.eval.open()][:args.count]
    questions = [row["question"] for row in rows]
    teacher = Teacher(args.gguf, "cpu", torch.float32)
    prefix = teacher.prefill(DIALOGUE)
    candidates = {"teacher": (None, [eight_words(row["opener"]) for row in rows]),
                  "constant": (None, [CONSTANT] * len(rows))}
    for folder in args.folders:
        model, tokenizer = load(folder)
        candidates[str(folder)] = (loss_on_first_tokens(model, tokenizer, rows), openers(model, tokenizer, questions))
    scores = {name: judge(teacher, prefix, questions, said) for name, (_, said) in candidates.items()}
    at = max(1, len(rows) // 20)
    means, worsts = (sorted(s[i] for s in scores["teacher"]) for i in (0, 1))
    print(f"thresholds (95 % of the teacher's openers): mean {means[at]:.2f}, worst token {worsts[at]:.2f}")
    report = {}
    for name, (loss, said) in candidates.items():
        judged = scores[name]
        share = lambda hits: sum(hits) / len(rows)  # noqa: E731
        report[name] = {
            "loss_first_ten_tokens": loss, "mean": sum(m for m, _ in judged) / len(rows), "worst": sum(w for _, w in judged) / len(rows),
            "accepted_by_mean": share(m >= means[at] for m, _ in judged), "accepted_by_worst": share(w >= worsts[at] for _, w in judged),
            "accepted": share(m >= means[at] and w >= worsts[at] for m, w in judged),
            "distinct": len(set(said)), "subject_named": share(names_subject(q, o) for q, o in zip(questions, said)),
        }
        print(name, json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in report[name].items()}), flush=True)
        for question, opener in list(zip(questions, said))[:12]:
            print(f"    {question} -> {opener}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
