"""Data: questions, self-instructed from the teacher, and the teacher's openers with the distribution behind each word.

    python -m ulm.data --gguf TEACHER.gguf --out openers.jsonl [--questions FILE.jsonl ...] --new 30000
"""
from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch

from .teacher import DIALOGUE, EXAMPLES, Teacher

OPENER_TOKENS = 16  # eight words and a little more
TOP_K = 16          # candidates kept per step for distillation: they hold nearly all of the probability
SEEDS = [q for q, _ in EXAMPLES] + [
    "what time is it in tokyo", "tell me a joke", "how long do eggs need to boil", "why is the sky blue", "play some jazz",
    "who wrote pride and prejudice", "remind me to call mom at six", "what's the capital of peru", "turn off the kitchen lights",
    "how do i get a red wine stain out of a carpet", "good morning", "what should i cook tonight", "is it going to rain tomorrow",
    "how far is the moon", "what does photosynthesis mean", "can dogs eat chocolate", "book a table for two on friday"]


def questions_from(files: list[Path]) -> list[str]:
    found = []
    for file in files:
        found += [json.loads(line)["question"] for line in file.read_text().splitlines() if line.strip()]
    return found


def usable_question(text: str) -> bool:
    words = text.split()
    return (2 <= len(words) <= 24 and text.isprintable() and text.isascii() and "User:" not in text and "Assistant:" not in text
            and len(set(words)) > len(words) / 2)


def invent(teacher: Teacher, known: list[str], rng: random.Random, generator: torch.Generator, batch: int) -> list[str]:
    """New user turns, sampled after a list of eight known ones."""
    shots = rng.sample(known, 8)
    prefix = teacher.prefill("Messages that different people said to their voice assistant:\n" + "".join(f"User: {q}\n" for q in shots))
    made = teacher.generate(prefix, ["User:"] * batch, 28, generator, temperature=1.0)
    texts = (teacher.tokenizer.decode(tokens).strip() for tokens, ended, _ in made if ended)
    return [t for t in texts if usable_question(t)]


def usable_opener(question: str, opener: str, examples: set[str]) -> bool:
    """No copies of the examples, no loops, no echo of the question, and at least two words."""
    words = re.findall(r"\w+", opener.lower())
    if len(words) < 2 or opener in examples or not opener.isprintable():
        return False
    pairs = list(zip(words, words[1:]))
    if len(pairs) > 3 and len(set(pairs)) < 0.8 * len(pairs):
        return False
    return words != re.findall(r"\w+", question.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; an existing file is added to")
    parser.add_argument("--questions", type=Path, nargs="*", default=[], help="JSON lines with a `question` field")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="held-out questions that must not be trained on")
    parser.add_argument("--new", type=int, default=30000, help="questions to invent")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rng, generator = random.Random(args.seed), torch.Generator(args.device).manual_seed(args.seed)
    teacher = Teacher(args.gguf, args.device)
    dialogue = teacher.prefill(DIALOGUE)
    examples = {a for _, a in EXAMPLES}
    done = {json.loads(line)["question"].lower() for line in args.out.open()} if args.out.exists() else set()
    barred = {q.lower() for q in questions_from(args.exclude)}
    given = list(dict.fromkeys(questions_from(args.questions)))
    known = (given or SEEDS)[:]
    rng.shuffle(given)
    waiting = [q for q in given if q.lower() not in done | barred]
    invented, written, started = max(0, len(done) - len(given)), 0, time.monotonic()
    with args.out.open("a") as out:
        while True:
            while len(waiting) < args.batch and invented < args.new:
                fresh = [q for q in invent(teacher, known, rng, generator, args.batch) if q.lower() not in done | barred]
                fresh = list({q.lower(): q for q in fresh}.values())
                invented += len(fresh)
                waiting += fresh
                if not given:
                    known += fresh
            if not waiting:
                break
            batch, waiting = waiting[:args.batch], waiting[args.batch:]
            batch = [q for q in batch if q.lower() not in done]
            made = teacher.generate(dialogue, [f"User: {q}\nAssistant:" for q in batch], OPENER_TOKENS, top_k=TOP_K)
            for question, (tokens, ended, top) in zip(batch, made):
                done.add(question.lower())
                opener = teacher.tokenizer.decode(tokens).strip()
                if usable_opener(question, opener, examples):
                    out.write(json.dumps({
                        "question": question, "opener": opener, "complete": ended, "tokens": tokens,
                        "top": [[ids, [round(v, 2) for v in values]] for ids, values in top]}) + "\n")
                    written += 1
            out.flush()
            print(f"{written} openers, {invented} questions invented, {written / (time.monotonic() - started):.1f} a second", flush=True)


if __name__ == "__main__":
    main()
