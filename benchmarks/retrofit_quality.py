"""What does a retrofit keep of a dense model's quality at long context, and what does each part of it cost?

A dense Llama is trained at a short context on Python source, then given longer ones in every way of
``retrofit_variants.py``, with RoPE stretched ("NTK-aware") and the same tokens to tune on. Measured on packages that
were held out: perplexity by position, copies by distance, needles by depth, variable tracking and aggregation, and the
short texts of before; beside them attention FLOPs and KV entries. Then models from scratch, at equal training FLOPs.

Every second row that a model trains on, from the first step on, has questions like those asked later planted in its
text (other names, other values, other text): without them a model this small would not know the form of the question.

    PYTHONPATH=.:benchmarks python benchmarks/retrofit_quality.py --work FOLDER
    PYTHONPATH=.:benchmarks python benchmarks/retrofit_quality.py --work FOLDER --small        the path, on a CPU

Everything is kept in the folder: what is finished is not done again, training stops at ``--limit`` seconds and goes on
from there when the same command is given again. Stages: corpus, pretrain, tune, scratch, report.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from long_context_probes import Prober, answered
from retrofit_variants import UNBOUNDED, VARIANTS, apply, attention_flops, kv_entries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_longnet import DilationPattern, LongNetConfig, LongNetForCausalLM
from modeling_longnet.head_loss import next_tokens, token_losses
from training.documents import installed_packages, python_packages, standard_library


STAGES = ("corpus", "pretrain", "tune", "scratch", "report")


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on; kept in the folder, and never changed within one."""

    context: int = 2048
    lengths: tuple[int, ...] = (16384, 32768)
    vocabulary: int = 16384
    shape: tuple[tuple[str, int], ...] = (
        ("hidden_size", 768), ("intermediate_size", 2560), ("num_hidden_layers", 14), ("num_attention_heads", 12),
        ("num_key_value_heads", 4), ("head_dim", 64),
    )  # fmt: skip
    corpus_bytes: int = 400_000_000
    pretrain_tokens: int = 120_000_000
    pretrain_batch_tokens: int = 131_072
    tune_steps: int = 100
    tune_batch_tokens: int = 65_536
    tune_learning_rate: float = 2e-4
    probe_share: float = 0.5
    pieces: int = 24
    trials: int = 20
    scratch_flops: float = 1.5e16
    scratch_length: int = 32768

    @classmethod
    def small(cls) -> "Settings":
        """Settings that a CPU runs through in half a minute."""
        shape = (
            ("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2), ("num_attention_heads", 4),
            ("num_key_value_heads", 2), ("head_dim", 8),
        )  # fmt: skip
        return cls(
            context=256, lengths=(512, 1024), vocabulary=512, shape=shape, corpus_bytes=400_000,
            pretrain_tokens=4096, pretrain_batch_tokens=1024, tune_steps=2, tune_batch_tokens=1024, pieces=2, trials=1,
            scratch_flops=1e9, scratch_length=1024,
        )  # fmt: skip


class OutOfTime(Exception):
    """The limit is reached; what was done is saved."""


class Study:
    """The experiment in one folder."""

    def __init__(self, folder: Path, settings: Settings, limit_s: float):
        self.folder, self.settings = folder, settings
        self.deadline = time.monotonic() + limit_s
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "settings.json"
        ours = json.dumps(asdict(settings), indent=1)
        if not saved.exists():
            saved.write_text(ours)
        elif saved.read_text() != ours:
            raise SystemExit(f"error: {saved} has other settings than asked for now; choose another --work")

    # --- corpus ---

    def corpus(self) -> None:
        """Read packages, train a tokenizer, and keep both kinds of text as token ids."""
        if (self.folder / "held_out.npy").exists():
            return
        texts = {}
        for held_out in (False, True):
            share = self.settings.corpus_bytes // (8 if held_out else 1)
            texts[held_out] = list(self._texts(held_out, share))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        sample, size = [], 0
        for text in texts[False][:: max(1, len(texts[False]) // 400)]:
            sample.append(text[:200_000])
            size += len(sample[-1])
            if size > 30_000_000:
                break
        tokenizer.train_from_iterator(
            sample,
            trainers.BpeTrainer(
                vocab_size=self.settings.vocabulary, special_tokens=["<end>"], show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )  # fmt: skip
        tokenizer.save(str(self.folder / "tokenizer.json"))
        for held_out, name in ((False, "train"), (True, "held_out")):
            documents = [
                np.array([*(token for part in parts for token in part.ids), 0], dtype=np.uint16)
                for parts in self._encoded(tokenizer, texts[held_out])
            ]
            np.save(self.folder / f"{name}_ends.npy", np.cumsum([len(d) for d in documents]))
            np.save(self.folder / f"{name}.npy", np.concatenate(documents))
            print(f"corpus: {name} has {sum(map(len, documents)):,} tokens in {len(documents)} packages", flush=True)

    def _texts(self, held_out: bool, most_bytes: int) -> Iterator[str]:
        size = 0
        for document in python_packages([standard_library(), installed_packages()], held_out):
            if size > most_bytes:
                return
            size += len(document["text"])
            yield document["text"]

    @staticmethod
    def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list]:
        """Encode texts in stretches that the tokenizer's threads can share."""
        for text in texts:
            stretches = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
            yield tokenizer.encode_batch(stretches)

    @cache  # noqa: B019  (one study per process)
    def tokens(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy").astype(np.int64))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    # --- training ---

    def rows(self, seed: str, length: int, batch_tokens: int) -> Callable[[int], Tensor]:
        """Return a function from the step to its batch ``[rows, length]``, the same in every run."""
        text = self.tokens("train")
        batch = max(1, batch_tokens // length)

        def batch_of(step: int) -> Tensor:
            generator = np.random.default_rng([*seed.encode(), step])
            prober = Prober(self.encode, text, int(generator.integers(2**31)))
            rows = []
            for _ in range(batch):
                if generator.random() < self.settings.probe_share:
                    questions = int(generator.choice([1, 2, 4, 8]))
                    rows.append(prober.training_row(length, max(1, min(questions, length // 1024))))
                else:
                    start = int(generator.integers(len(text) - length))
                    rows.append(text[start : start + length])
            return torch.stack(rows)

        return batch_of

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        batch_of: Callable[[int], Tensor],
        steps: int,
        learning_rate: float,
        micro_tokens: int = 65_536,
    ) -> PreTrainedModel:
        """Train with AdamW, bfloat16 autocast and a cosine schedule; go on from a saved state, save one at the limit."""
        state_path = self.folder / f"{name}.state.pt"
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=self.device.type == "cuda"
        )
        step, seconds, losses = 0, 0.0, []
        if state_path.exists():
            state = torch.load(state_path, map_location=self.device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, seconds, losses = state["step"], state["seconds"], state["losses"]
        model.train()
        start = time.monotonic()
        warm_up = max(1, steps // 20)
        while step < steps:
            if time.monotonic() > self.deadline:
                seconds += time.monotonic() - start
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                temporary = state_path.with_suffix(".part")
                torch.save(state | {"seconds": seconds, "losses": losses}, temporary)
                temporary.replace(state_path)
                raise OutOfTime(f"{name} stands at step {step} of {steps}")
            rate = min((step + 1) / warm_up, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            batch = batch_of(step).to(self.device)
            micro = batch.split(max(1, micro_tokens // batch.shape[1]))
            total = torch.zeros((), device=self.device)
            for rows in micro:
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = self._loss(model, rows) * (len(rows) / len(batch))
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0 or step == steps:
                losses.append([step, total.item()])
                spent = seconds + time.monotonic() - start
                print(f"{name}: step {step}/{steps}, loss {total.item():.3f}, {spent:.0f} s", flush=True)
        self._training = {
            "steps": steps, "tokens": steps * batch.numel() if steps else 0, "losses": losses,
            "seconds": round(seconds + time.monotonic() - start, 1),
        }  # fmt: skip
        state_path.unlink(missing_ok=True)
        return model.eval()

    @staticmethod
    def _loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
        return model(input_ids=rows, labels=rows, use_cache=False).loss

    def pretrain(self) -> None:
        """Train the dense Llama at the short context, or take the one in the folder."""
        target = self.folder / "dense"
        if (target / "config.json").exists():
            return
        torch.manual_seed(0)
        config = LlamaConfig(
            **dict(self.settings.shape), vocab_size=self.settings.vocabulary, tie_word_embeddings=True,
            max_position_embeddings=self.settings.context, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(self.device)
        print(f"pretrain: {model.num_parameters():,} parameters", flush=True)
        settings = self.settings
        batch_of = self.rows("pretrain", settings.context, settings.pretrain_batch_tokens)
        steps = settings.pretrain_tokens // settings.pretrain_batch_tokens
        model = self.train("pretrain", model, batch_of, steps, 1e-3)
        temporary = self.folder / "dense.part"
        model.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(self._training))
        temporary.rename(target)

    def stretched(self, length: int) -> LongNetForCausalLM:
        """Load the dense model's weights into a LongNet model with RoPE stretched to ``length``."""
        llama = LlamaForCausalLM.from_pretrained(self.folder / "dense")
        fields = llama.config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype"):
            fields.pop(name, None)
        head_dim, stretch = llama.config.head_dim, length / self.settings.context
        rope = dict(llama.config.rope_parameters)
        rope["rope_theta"] *= stretch ** (head_dim / (head_dim - 2))
        fields |= {"rope_parameters": rope, "max_position_embeddings": length}
        config = LongNetConfig(**fields, segment_lengths=(UNBOUNDED,), dilation_rates=(1,))
        model = LongNetForCausalLM(config)
        model.load_state_dict(llama.state_dict())
        return model.to(self.device)

    # --- measuring ---

    def pieces(self, length: int, count: int) -> Tensor:
        """Return held-out stretches ``[count, length]``, each of one package, evenly spread over those long enough."""
        text = self.tokens("held_out")
        ends = np.load(self.folder / "held_out_ends.npy")
        found = []
        for start, end in zip([0, *ends[:-1]], ends):
            found += [text[i : i + length] for i in range(start, end - length + 1, length)]
        if not found:
            raise SystemExit(f"error: no held-out package has {length} tokens")
        return torch.stack([found[i * len(found) // count] for i in range(min(count, len(found)))])

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, pieces: Tensor) -> Tensor:
        """Compute the loss of each token but the first, ``[count, length - 1]``."""
        found = []
        for piece in pieces:
            tokens = piece[None].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
                found.append(token_losses(hidden, model.lm_head, next_tokens(tokens))[0, :-1].float().cpu())
        return torch.stack(found)

    def measure(self, model: PreTrainedModel, length: int, probes: bool = True) -> dict:
        """Measure perplexity by position, and the probes."""
        model.eval()
        settings = self.settings
        losses = self.losses(model, self.pieces(length, settings.pieces))
        cuts = [n for n in (settings.context, 4 * settings.context, length) if n <= length]
        by_piece = losses.mean(1)
        result = {
            "nll": losses.mean().item(),
            "nll_standard_error": (by_piece.std() / math.sqrt(len(by_piece))).item() if len(by_piece) > 1 else None,
            "nll_by_piece": [round(x, 5) for x in by_piece.tolist()],
            "nll_up_to": {str(n): losses[:, : n - 1].mean().item() for n in dict.fromkeys(cuts)},
            "nll_by_position": [part.mean().item() for part in losses.mean(0).tensor_split(32)],
        }
        if not probes:
            return result
        text, trials = self.tokens("held_out"), settings.trials
        with torch.autocast(self.device.type, torch.bfloat16):
            prober = Prober(self.encode, text, seed=length)
            result["needle"] = {
                str(depth): answered(model, [prober.needle(length, depth) for _ in range(trials)])[0]
                for depth in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
            }
            for name in ("variable_tracking", "aggregation"):
                result[name] = answered(model, [getattr(prober, name)(length) for _ in range(2 * trials)])[0]
            distances = [d for d in (length // 16, length // 5, length // 2, length - 256) if d >= 64]
            result["copy_nll"] = {
                str(d): answered(model, [prober.copy(length, d) for _ in range(trials)])[1] for d in distances
            }
        return result

    # --- stages ---

    def tune(self, names: list[str]) -> None:
        """Tune and measure every variant at every length, shortest first."""
        self._base()
        settings = self.settings
        for length in settings.lengths:
            for name in names:
                path = self.folder / f"tuned_{name}_{length}.json"
                if path.exists():
                    continue
                self._check_time(f"{name} at {length}")
                variant = VARIANTS[name]
                torch.manual_seed(0)
                model = self.stretched(length)
                apply(model, variant, settings.context, length, training=False)
                before = self.measure(model, length, probes=False)
                apply(model, variant, settings.context, length, training=True)
                # The same rows for every variant.
                batch_of = self.rows(f"tune {length}", length, settings.tune_batch_tokens)
                self.train(f"tuned_{name}_{length}", model, batch_of, settings.tune_steps, settings.tune_learning_rate)
                apply(model, variant, settings.context, length, training=False)
                result = self.measure(model, length) | {
                    "variant": name, "length": length, "note": variant.note, "untuned_nll": before["nll"],
                    "training": self._training,
                    "attention_flops": attention_flops(variant, model.config, settings.context, length),
                    "attention_flops_131072": attention_flops(variant, model.config, settings.context, 2**17),
                    "kv_entries": kv_entries(variant, model.config, settings.context, length),
                }  # fmt: skip
                self._save(path, result)

    def _base(self) -> None:
        """Measure the dense model at its own context, before anything is changed."""
        path = self.folder / "base.json"
        if not path.exists():
            model = LlamaForCausalLM.from_pretrained(self.folder / "dense").to(self.device)
            self._save(path, self.measure(model, self.settings.context))

    def scratch(self) -> None:
        """Train models of the same shape from scratch, each with the same training FLOPs, and measure them."""
        settings = self.settings
        length = settings.scratch_length
        dense = DilationPattern((UNBOUNDED,), (1,))
        paper = DilationPattern.geometric(settings.context, length, preset="paper")
        window = DilationPattern.preset("retrofit", (settings.context,), (1,))
        shape = dict(settings.shape)
        for name, pattern, fields in (
            ("dense", dense, {}),
            ("window", window, {}),
            ("paper", paper, {}),
            ("paper_magneto", paper, {"backbone": "magneto"}),
        ):
            path = self.folder / f"scratch_{name}.json"
            if path.exists():
                continue
            self._check_time(f"{name} from scratch")
            rules = ("segment_lengths", "dilation_rates", "head_offsets", "count_overlaps", "dilate_queries", "window")
            torch.manual_seed(0)
            config = LongNetConfig(
                **shape, **fields, **{rule: getattr(pattern, rule) for rule in rules}, tie_word_embeddings=True,
                vocab_size=settings.vocabulary, max_position_embeddings=length, bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            model = LongNetForCausalLM(config).to(self.device)
            attention = shape["num_hidden_layers"] * pattern.attention_flops(
                length, shape["num_attention_heads"], shape["head_dim"], num_kv_heads=shape["num_key_value_heads"]
            )
            weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
            per_row = 6 * weights * length + 3 * attention
            batch = max(1, settings.tune_batch_tokens // length)
            steps = max(1, round(settings.scratch_flops / per_row / batch))
            batch_of = self.rows("scratch", length, settings.tune_batch_tokens)
            self.train(f"scratch_{name}", model, batch_of, steps, 1e-3)
            result = self.measure(model, length, probes=False) | {
                "variant": name, "length": length, "training": self._training,
                "training_flops": per_row * batch * steps, "attention_share": 3 * attention / per_row,
            }  # fmt: skip
            self._save(path, result)

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"next is {what}")

    def _save(self, path: Path, result: dict) -> None:
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        result |= {"card": card, "torch": torch.__version__, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(path)
        print(f"{path.stem}: nll {result['nll']:.4f}, needle {result.get('needle')}", flush=True)

    def report(self, output: Path) -> None:
        """Write tables and plots of what the folder holds so far."""
        tuned = [json.loads(path.read_text()) for path in sorted(self.folder.glob("tuned_*.json"))]
        scratch = [json.loads(path.read_text()) for path in sorted(self.folder.glob("scratch_*.json"))]
        if not tuned and not scratch:
            raise SystemExit(f"error: {self.folder} holds no results yet")
        base = json.loads((self.folder / "base.json").read_text()) if (self.folder / "base.json").exists() else None
        any_result = (tuned or scratch)[0]
        card, day = any_result["card"].replace(" ", "-"), any_result["time"][:10]
        output.mkdir(parents=True, exist_ok=True)
        stem = output / f"retrofit_quality_{card}_{day}"
        everything = {
            "settings": asdict(self.settings), "command": " ".join(sys.argv), "base": base, "tuned": tuned,
            "scratch": scratch,
        }  # fmt: skip
        stem.with_suffix(".json").write_text(json.dumps(everything, indent=1))
        rows = list(_table(tuned, base, self.settings))
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["variant"])
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(*(f"{name}={value}" for name, value in row.items()))
        for result in scratch:
            cuts = ", ".join(f"{n}: {math.exp(nll):.3f}" for n, nll in result["nll_up_to"].items())
            print(
                f"from scratch, {result['variant']}: {result['training']['tokens']:,} tokens, perplexity up to {cuts}"
            )
        print(f"wrote {stem}.csv and .json")
        _plot(tuned, scratch, stem.with_suffix(".png"))


def _table(tuned: list[dict], base: dict | None, settings: Settings) -> Iterator[dict]:
    dense = {result["length"]: result for result in tuned if result["variant"] == "dense"}
    order = {name: i for i, name in enumerate(VARIANTS)}
    for result in sorted(tuned, key=lambda r: (r["length"], order[r["variant"]])):
        upper, needle = dense.get(result["length"]), result["needle"]
        row = {
            "variant": result["variant"], "length": result["length"], "perplexity": f"{math.exp(result['nll']):.4f}",
            "above_dense_percent": "", "paired_standard_error": "",
            "untuned_perplexity": f"{math.exp(result['untuned_nll']):.3f}",
            "short_perplexity": f"{math.exp(result['nll_up_to'][str(settings.context)]):.4f}",
            "short_perplexity_before": f"{math.exp(base['nll']):.4f}" if base else "",
            "needle_worst_depth": min(needle.values()), "needle_mean": f"{sum(needle.values()) / len(needle):.3f}",
            "variable_tracking": result["variable_tracking"], "aggregation": result["aggregation"],
            "copy_nll": " ".join(f"{d}:{nll:.2f}" for d, nll in result["copy_nll"].items()),
            "times_fewer_flops": "", "times_fewer_flops_131072": "", "times_fewer_kv": "",
            "tune_tokens": result["training"]["tokens"], "tune_seconds": result["training"]["seconds"],
        }  # fmt: skip
        if upper:
            gaps = torch.tensor(result["nll_by_piece"]) - torch.tensor(upper["nll_by_piece"])
            row["above_dense_percent"] = f"{100 * math.expm1(result['nll'] - upper['nll']):.2f}"
            if len(gaps) > 1:
                row["paired_standard_error"] = f"{100 * (gaps.std() / math.sqrt(len(gaps))).item():.2f}"
            for column, field in (
                ("times_fewer_flops", "attention_flops"),
                ("times_fewer_flops_131072", "attention_flops_131072"),
                ("times_fewer_kv", "kv_entries"),
            ):
                row[column] = f"{upper[field] / result[field]:.2f}"
        yield row


def _plot(tuned: list[dict], scratch: list[dict], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed; run the stage report elsewhere for the plots")
        return
    lengths = sorted({result["length"] for result in tuned})
    figure = Figure(figsize=(5.5 * (len(lengths) + bool(scratch)), 12), layout="constrained")
    panels = figure.subplots(3, max(1, len(lengths) + bool(scratch)), squeeze=False)
    for column, length in enumerate(lengths):
        position, needle, frontier = panels[:, column]
        for result in (r for r in tuned if r["length"] == length):
            name = result["variant"]
            places = [(i + 0.5) * length / 32 for i in range(32)]
            position.plot(places, [math.exp(x) for x in result["nll_by_position"]], label=name, linewidth=1)
            needle.plot([float(d) for d in result["needle"]], list(result["needle"].values()), label=name, marker=".")
            frontier.plot(result["attention_flops"], math.exp(result["nll"]), "o")
            frontier.annotate(name, (result["attention_flops"], math.exp(result["nll"])), fontsize=7)
        position.set(title=f"perplexity by position, {length:,} tokens", xlabel="position", ylabel="perplexity")
        needle.set(title="needles found, by depth", xlabel="depth", ylim=(-0.05, 1.05))
        frontier.set(title="perplexity by attention FLOPs", xlabel="FLOPs of reading once", xscale="log")
        position.legend(fontsize=7)
        needle.legend(fontsize=7)
    for panel in panels[1:, -1] if scratch else ():
        panel.axis("off")
    for result in scratch:
        places = [(i + 0.5) * result["length"] / 32 for i in range(32)]
        panels[0, -1].plot(places, [math.exp(x) for x in result["nll_by_position"]], label=result["variant"])
    if scratch:
        panels[0, -1].set(title="from scratch, equal training FLOPs", xlabel="position", ylabel="perplexity")
        panels[0, -1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--limit", type=float, default=math.inf, help="stop and save after so many seconds")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tests the path on any machine")
    parser.add_argument("--lengths", type=int, nargs="+", help="contexts to tune for")
    parser.add_argument("--pretrain-tokens", type=int)
    parser.add_argument("--tune-steps", type=int)
    parser.add_argument("--scratch-flops", type=float)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chosen = ("lengths", "pretrain_tokens", "tune_steps", "scratch_flops")
    given = {name: getattr(arguments, name) for name in chosen if getattr(arguments, name) is not None}
    if "lengths" in given:
        given["lengths"] = tuple(given["lengths"])
    settings = Settings(**{**asdict(Settings.small() if arguments.small else Settings()), **given})
    study = Study(arguments.work, settings, arguments.limit)
    try:
        for stage in arguments.stages:
            if stage == "tune":
                study.tune(arguments.variants)
            elif stage == "report":
                study.report(arguments.output)
            else:
                getattr(study, stage)()
    except OutOfTime as stop:
        print(f"stopped at the limit: {stop}; give the same command again to go on")


if __name__ == "__main__":
    main()
