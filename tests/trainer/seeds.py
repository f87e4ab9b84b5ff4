"""How much of what GRPO earns is its seed: the loop of `main_ppo` on a CPU, without an engine, for several seeds.

    drydock run cpu-vllm -e PYTHONPATH=/drydock/src:/drydock/tests -- python /drydock/tests/trainer/seeds.py 12 24

It prints, for each number of samples, the mean reward over the last three of 16 steps, seed by seed: what
`test_main_ppo_learns` holds to its threshold. Its arithmetic is bfloat16 as there, its sampling its own. 30 seeds of
12 samples take four minutes on one core, of 24 six.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
import verl_run
from arithmetic import Problem, best_constant, problems
from grpo import END, Completion, Learner, Rollouts, Trainer

from drydock.tiers.profiles import read_profile

SEEDS = 30


class Alone(Learner):
    """A policy that writes where it is trained."""

    def log_probs(self, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().log_probs(prompts, responses)

    def rollouts(self, chosen: Sequence[Problem], samples: int, seed: int) -> Rollouts:
        """`samples` completions of each problem at temperature 1."""
        draw = torch.Generator().manual_seed(seed)
        tokens = self.encode([problem.prompt for problem in chosen for _ in range(samples)])
        prompt, log_probs = tokens.shape[1], torch.zeros(len(tokens), 0)
        for _ in range(verl_run.LONGEST):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                rows = torch.log_softmax(self.model(input_ids=tokens).logits[:, -1].float(), dim=-1)
            drawn = torch.multinomial(rows.exp(), 1, generator=draw)
            tokens = torch.cat([tokens, drawn], dim=1)
            log_probs = torch.cat([log_probs, rows.gather(1, drawn)], dim=1)
        completions = []
        for written, of_each in zip(tokens[:, prompt:].tolist(), log_probs.tolist(), strict=True):
            finished = END in written
            length = written.index(END) + 1 if finished else len(written)
            text = self.tokenizer.decode(written[:length], skip_special_tokens=True)
            completions.append(
                Completion(tokens=written[:length], log_probs=of_each[:length], text=text, finished=finished)
            )
        return self.judged(chosen, samples, completions, verl_run.LONGEST)


def main(numbers: Sequence[int]) -> None:
    torch.set_num_threads(1)
    profile = read_profile(Path(__file__).with_name("profile.toml"), "full")
    known = problems(profile["main_ppo_operands"])
    threshold = best_constant(known) + profile["margin"]
    with tempfile.TemporaryDirectory() as folder:
        model = verl_run.make_model(Path(folder), known, profile["warm_up_steps"])
        for samples in numbers:
            ends = []
            for seed in range(SEEDS):
                trainer = Trainer(
                    Alone(model), learning_rate=profile["learning_rate"], epochs=profile["epochs"]
                )
                steps = profile["main_ppo_steps"]
                earned = [trainer.step(known, samples, seed * steps + step).reward for step in range(steps)]
                ends.append(mean(earned[-3:]))
                print(f"{samples} samples, seed {seed}: {ends[-1]:.3f}", flush=True)
            over = sum(end > threshold for end in ends)
            print(
                f"{samples} samples: {over} of {SEEDS} seeds over {threshold:.2f}, mean {mean(ends):.2f}, "
                f"lowest {min(ends):.2f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("samples", type=int, nargs="+", help="completions of each problem, two at least")
    main(parser.parse_args().samples)
