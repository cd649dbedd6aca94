"""Small tasks whose answer stands far back in the text, in the manner of RULER (arXiv 2404.06654), for models of code.

Each is a stretch of real code with lines planted in it and a question at the end whose answer follows from them alone.
A model is right if each token of the answer is its most likely one, the tokens before it given.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


HOPS = 3
DEPTHS = 0.98  # of the last line of a chain or of votes, at most
CANDIDATES, VOTES_EACH, VOTES_OF_THE_WINNER = 4, 2, 7


@dataclass
class Probe:
    """Tokens ``[length]``, of which those from ``answer_start`` on are the answer."""

    tokens: Tensor
    answer_start: int


@dataclass
class Task:
    """Lines to plant at ascending depths, a question that comes after them, and its answer; all in token ids."""

    lines: list[tuple[float, list[int]]]
    question: list[int]
    answer: list[int]


class Prober:
    """Plant probes into real text.

    Args:
        encode: turns a text into token ids.
        text: real tokens to plant in, one-dimensional.
        seed: of all random choices; equal seeds give equal probes.
    """

    def __init__(self, encode, text: Tensor, seed: int):
        self.encode = encode
        self.text = text
        self.random = random.Random(seed)

    def needle(self, length: int, depth: float) -> Probe:
        """One assignment at ``depth`` (0: the beginning, 1: the end); asked for its value."""
        return self._probe(length, self._needle(depth))

    def variable_tracking(self, length: int, hops: int = HOPS) -> Probe:
        """A chain of assignments spread over the text; asked for the value at its end."""
        return self._probe(length, self._chain(hops))

    def aggregation(self, length: int) -> Probe:
        """Votes for some words all over the text; asked for the word with most of them."""
        return self._probe(length, self._votes())

    def copy(self, length: int, distance: int, span: int = 64) -> Probe:
        """Text whose end repeats what stands ``distance`` tokens before, word for word, after a fourth as a cue."""
        tokens = self._filler(length)
        tokens[-span:] = tokens[length - span - distance : length - distance]
        return Probe(tokens, length - span * 3 // 4)

    def training_row(self, length: int, questions: int) -> tuple[Tensor, Tensor]:
        """Real text with needles, chains and an election strewn over it, each asked for later: what training may see.

        Lines and questions of all of them stand in between each other, so that distances of every size occur.

        Returns:
            The tokens ``[length]``, and which of them answer a question, bool.
        """
        planted = []
        for i in range(questions):
            kinds = ("needle", "needle", "chain", "votes") if i == 0 else ("needle", "needle", "chain")
            kind = self.random.choice(kinds)
            task = self._needle(self.random.random()) if kind == "needle" else getattr(self, f"_{kind}")()
            end = max(self.random.random(), self.random.random())
            planted += [(place * end, line, 0) for place, line in task.lines]
            planted.append((end, [*task.question, *task.answer, *self.encode('"\n')], len(task.question)))
        planted.sort(key=lambda line: line[0])
        tokens, places = self._plant(length, [(place, line) for place, line, _ in planted])
        answers = torch.zeros(length, dtype=torch.bool)
        closing = len(self.encode('"\n'))
        for place, (_, line, question) in zip(places, planted):
            if question:
                answers[place + question : place + len(line) - closing] = True
        return tokens, answers

    def _needle(self, depth: float) -> Task:
        name, value = self._name(), self._value()
        lines = [(depth, self._assignment(name, value))]
        return Task(lines, self._question(f"secret_{name}"), self.encode(value))

    def _chain(self, hops: int = HOPS) -> Task:
        names, value = [self._name() for _ in range(hops + 1)], self._value()
        lines = [self._assignment(names[0], value)]
        lines += [self.encode(f"\nsecret_{new} = secret_{old}\n") for old, new in zip(names, names[1:])]
        depths = sorted(self.random.random() * DEPTHS for _ in lines)
        return Task(list(zip(depths, lines)), self._question(f"secret_{names[-1]}"), self.encode(value))

    def _votes(self) -> Task:
        words = [self._name() for _ in range(CANDIDATES)]
        ballots = [words[0]] * VOTES_OF_THE_WINNER + [word for word in words[1:] for _ in range(VOTES_EACH)]
        lines = [
            (self.random.random() * DEPTHS, [*self.encode('\nvote("'), *self.encode(word), *self.encode('")\n')])
            for word in ballots
        ]
        return Task(sorted(lines), self.encode('\nmost_votes = "'), self.encode(words[0]))

    def _probe(self, length: int, task: Task) -> Probe:
        end = [*task.question, *task.answer]
        tokens, _ = self._plant(length - len(end), task.lines)
        return Probe(torch.cat([tokens, torch.tensor(end)]), length - len(task.answer))

    def _plant(self, length: int, lines: list[tuple[float, list[int]]]) -> tuple[Tensor, list[int]]:
        """Put lines at ascending depths into real text, ``length`` tokens in all; return those, and where lines start."""
        room = length - sum(len(line) for _, line in lines)
        if room < 0:
            raise ValueError(f"{length} tokens have no room for the {length - room} of {len(lines)} planted lines")
        filler = self._filler(room)
        parts, starts, last, planted = [], [], 0, 0
        for depth, line in lines:
            place = int(depth * room)
            parts += [filler[last:place], torch.tensor(line)]
            starts.append(place + planted)
            last, planted = place, planted + len(line)
        return torch.cat([*parts, filler[last:]]), starts

    def _filler(self, length: int) -> Tensor:
        start = self.random.randrange(len(self.text) - length)
        return self.text[start : start + length].to(torch.int64, copy=True)

    def _assignment(self, name: str, value: str) -> list[int]:
        # The value's tokens by themselves, so that question and line have the same.
        return [*self.encode(f'\nsecret_{name} = "'), *self.encode(value), *self.encode('"\n')]

    def _question(self, name: str) -> list[int]:
        return self.encode(f'\nassert {name} == "')

    def _name(self) -> str:
        return "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz", k=5))

    def _value(self) -> str:
        return "".join(self.random.choices("0123456789", k=5))


@torch.no_grad()
def answered(model, probes: list[Probe], batch: int = 1) -> tuple[float, float]:
    """Ask a causal LM all probes; return the share answered right and the mean loss of the answers' tokens.

    ``batch`` probes, which are of one length then, go through the model together.
    """
    right, losses = 0, []
    for first in range(0, len(probes), batch):
        group = probes[first : first + batch]
        tokens = torch.stack([probe.tokens for probe in group]).to(model.device)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        for probe, states, row in zip(group, hidden, tokens):
            logits = model.lm_head(states[probe.answer_start - 1 : -1]).float()
            answer = row[probe.answer_start :]
            right += bool((logits.argmax(-1) == answer).all())
            losses.append(torch.nn.functional.cross_entropy(logits, answer).item())
    return right / len(probes), sum(losses) / len(losses)
