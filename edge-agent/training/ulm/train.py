"""Makes the student from the teacher and trains it: distillation of the teacher's openers, checkpointed and resumable.

    python -m ulm.train --gguf TEACHER.gguf --data openers.jsonl --out model/ [--shape 28m] [--passes 2.5]
"""
from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor

from .llama import Config, Llama
from .teacher import gguf_vocabulary, read_gguf, smaller_tokenizer

VOCABULARY = 12288
# Which of the teacher's 30 layers the student keeps: the first two and the last carry the most, the rest are spread between.
SHAPES = {"28m": [0, 1, 8, 15, 22, 29], "10m": [0, 29]}
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IGNORE = -100
CANDIDATES = 16


def prune(gguf_path: Path, shape: str) -> tuple[Llama, Tokenizer]:
    """The untrained student: some of the teacher's layers and the head of its vocabulary."""
    teacher, _ = read_gguf(gguf_path, torch.float32)
    kept = SHAPES[shape]
    config = Config(**{**teacher.config.__dict__, "layers": len(kept), "vocab": VOCABULARY})
    student, state = Llama(config), {}
    for name, tensor in teacher.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers":
            if int(parts[1]) in kept:
                state[".".join(["layers", str(kept.index(int(parts[1]))), *parts[2:]])] = tensor
        else:
            state[name] = tensor[:VOCABULARY] if parts[0] == "embed_tokens" else tensor
    student.load_state_dict(state)
    return student, smaller_tokenizer(*gguf_vocabulary(gguf_path), VOCABULARY)


class Examples:
    """Encoded training data. The student's token ids are a subset of the teacher's, so that no alignment is needed: a teacher's
    token that the student lacks stands for the first of the student's pieces that spell it."""

    def __init__(self, tokenizer: Tokenizer, teacher_tokens: list[str], rows: list[dict]) -> None:
        self.ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.tokenizer, self.teacher_tokens = tokenizer, teacher_tokens
        self.pieces: dict[int, list[int]] = {}
        user, assistant, end = self.ids(USER), self.ids(ASSISTANT), self.ids(END)
        self.rows = []
        for row in rows:
            question = self.ids(row["question"])
            answer, soft = self.answer(row)
            if row["complete"]:
                # The teacher ends a reply with a newline, the student with its end-of-turn token.
                answer, soft = answer + end, soft + [soft_of(row["top"], len(row["tokens"]), self)]
            prompt = user + question + assistant
            self.rows.append((prompt + answer, len(user), len(question), len(prompt), soft))

    def spell(self, token: int) -> list[int]:
        """The student's pieces for a teacher's token."""
        if token < VOCABULARY:
            return [token]
        if token not in self.pieces:
            self.pieces[token] = [self.tokenizer.token_to_id(p.value) for p in self.tokenizer.model.tokenize(self.teacher_tokens[token])]
        return self.pieces[token]

    def answer(self, row: dict) -> tuple[list[int], list]:
        """The opener in the student's tokens with a target for each: the teacher's candidates at the first piece of each of its
        tokens, the piece itself within one. The first token loses its leading space, which the student's template has no place for."""
        tokens, soft = [], []
        for step, token in enumerate(row["tokens"]):
            pieces = self.spell(token)
            if not tokens:
                pieces = self.ids(self.tokenizer.decode(pieces).lstrip())
                if pieces:
                    tokens += pieces
                    soft += [bare(row["top"][step], pieces[0], self)] + [None] * (len(pieces) - 1)
                continue
            tokens += pieces
            soft += [soft_of(row["top"], step, self)] + [None] * (len(pieces) - 1)
        return tokens, soft

    def batch(self, rows: list[tuple], question_weight: float):
        width = max(len(r[0]) for r in rows)
        tokens = torch.full((len(rows), width), 2)
        hard = torch.full((len(rows), width), IGNORE)
        weight = torch.zeros(len(rows), width)
        soft_ids = torch.zeros(len(rows), width, CANDIDATES, dtype=torch.long)
        soft_p = torch.zeros(len(rows), width, CANDIDATES)
        for i, (ids, user, question, prompt, soft) in enumerate(rows):
            tokens[i, :len(ids)] = torch.tensor(ids)
            hard[i, user - 1:user + question - 1] = torch.tensor(ids[user:user + question])
            weight[i, user - 1:user + question - 1] = question_weight
            for j, target in enumerate(soft):
                at = prompt + j - 1  # the position that predicts this token
                hard[i, at] = ids[prompt + j]
                weight[i, at] = 1.0
                if target is not None:
                    soft_ids[i, at, :len(target[0])] = torch.tensor(target[0])
                    soft_p[i, at, :len(target[1])] = torch.tensor(target[1])
        return tokens, hard, weight, soft_ids, soft_p


def soft_of(top: list, step: int, examples: Examples):
    """The teacher's candidates at a step as (ids, probabilities) over the student's tokens, or None when it is not known."""
    if step >= len(top):
        return None
    return merged([(2 if token == examples_newline(examples) else examples.spell(token)[0], logp)
                   for token, logp in zip(*top[step])])


def bare(top, fallback: int, examples: Examples):
    """The same for the first word, whose candidates lose their leading space."""
    pairs = []
    for token, logp in zip(*top):
        text = examples.teacher_tokens[token].replace("Ġ", " ")
        if text.startswith(" ") and text.strip().isascii() and text.strip():
            pairs.append((examples.ids(text.lstrip())[0], logp))
    return merged(pairs) if pairs else ([fallback], [1.0])


def examples_newline(examples: Examples) -> int:
    if not hasattr(examples, "_newline"):
        examples._newline = examples.ids("\n")[0]
    return examples._newline


def merged(pairs: list[tuple[int, float]]):
    total: dict[int, float] = {}
    for token, logp in pairs:
        total[token] = total.get(token, 0.0) + math.exp(logp)
    scale = sum(total.values())
    return list(total), [p / scale for p in total.values()]


def loss_of(model: Llama, batch, soft_share: float) -> tuple[Tensor, Tensor]:
    """(training loss, plain cross-entropy of the opener's tokens): the first mixes the teacher's distribution with the token."""
    tokens, hard, weight, soft_ids, soft_p = batch
    hidden = model.hidden(tokens)
    used = weight > 0
    logp = torch.log_softmax(model.logits(hidden[used]).float(), dim=-1)
    nll = -logp.gather(1, hard[used][:, None])[:, 0]
    known = soft_p[used].sum(dim=-1) > 0
    soft = -(logp.gather(1, soft_ids[used]) * soft_p[used]).sum(dim=-1)
    mixed = torch.where(known, soft_share * soft + (1 - soft_share) * nll, nll)
    w = weight[used]
    return (mixed * w).sum() / w.sum(), nll[w == 1.0].mean().detach()


def batches(rows: list[tuple], size: int, rng: random.Random):
    """Batches of similar length (little padding), in random order."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rng.random()))
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return [[rows[i] for i in group] for group in groups]


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face style folder: what `edge-agent --model` and transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in model.hugging_face_state().items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hugging_face(), indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
         "pad_token": "<|im_end|>", "chat_template": TEMPLATE}, indent=2) + "\n")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".segue/training"), help="checkpoints and the log")
    parser.add_argument("--shape", choices=SHAPES, default="28m")
    parser.add_argument("--passes", type=float, default=2.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--soft-share", type=float, default=0.7, help="share of the teacher's distribution in the loss")
    parser.add_argument("--question-weight", type=float, default=0.2)
    parser.add_argument("--held-out", type=int, default=400, help="rows kept back to watch the loss")
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule after this time, whatever was reached (0: off)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    log = (args.work / f"train-{args.shape}.jsonl").open("a")
    model, tokenizer = prune(args.gguf, args.shape)
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)
    rows = [json.loads(line) for line in args.data.open()]
    rng.shuffle(rows)
    examples = Examples(tokenizer, gguf_vocabulary(args.gguf)[0], rows)
    held, rows = examples.rows[:args.held_out], examples.rows[args.held_out:]
    steps = math.ceil(args.passes * len(rows) / args.batch)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                                  lr=args.rate, betas=(0.9, 0.95), fused=True)
    saved, step = args.work / f"checkpoint-{args.shape}.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
        print(f"going on at step {step}", flush=True)
    queue, done_batches, started, spent = [], 0, time.monotonic(), 0.0
    to = lambda batch: [t.to(args.device) for t in batch]  # noqa: E731
    while step < steps:
        while not queue:
            queue = batches(rows, args.batch, random.Random(args.seed + done_batches))
            skip = min(max(0, step - done_batches), len(queue))  # after a resume, what was trained on already
            done_batches += len(queue)
            queue = queue[skip:]
        progress = step / steps
        if args.minutes:
            progress = max(progress, (time.monotonic() - started) / 60 / args.minutes)
            if progress >= 1:
                break
        rate = args.rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(args.device, torch.bfloat16):
            loss, nll = loss_of(model, to(examples.batch(queue.pop(), args.question_weight)), args.soft_share)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        spent = time.monotonic() - started
        if step % 100 == 0 or step == steps:
            with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16):
                outside = [loss_of(model, to(examples.batch(held[i:i + 100], 0.0)), 1.0) for i in range(0, len(held), 100)]
            entry = {"step": step, "of": steps, "rate": round(rate, 6), "loss": round(loss.item(), 4), "nll": round(nll.item(), 4),
                     "held_out_nll": round(sum(n.item() for _, n in outside) / len(outside), 4),
                     "held_out_soft": round(sum(x.item() for x, _ in outside) / len(outside), 4), "seconds": round(spent)}
            print(json.dumps(entry), flush=True)
            log.write(json.dumps(entry) + "\n")
            log.flush()
        if step % 200 == 0:
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, saved)
    export(model, tokenizer, args.out)
    saved.unlink(missing_ok=True)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    main()
