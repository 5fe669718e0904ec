"""The barrier between two networks of other initialisations: `python -m benchmarks.barrier --output barrier/`.

Trains pairs of MLPs on scikit-learn's digits, each with its own initialisation and order of images, and takes the loss
along the line from the one to the other: as they are, and after the second one's units were put into the order of the
first's (`adamerge.permutations`). The barrier is the largest rise of the loss above the straight line between its ends.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamerge.drawing import save, style
from adamerge.files import write_text
from adamerge.permutations import apply, chain, match_activations, match_weights

STEPS = [step / 24 for step in range(25)]
State = dict[str, Tensor]
Curves = dict[str, dict[str, list[float]]]


def main(args: Sequence[str] | None = None) -> None:
    """Print barriers and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder for barrier.png and barrier.json")
    parser.add_argument("--width", type=int, default=256, help="of both hidden layers; default: 256")
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--pairs", type=int, default=3, help="of networks; default: 3")
    given = parser.parse_args(args)
    found = [curves(2 * pair, given.width, given.epochs) for pair in range(given.pairs)]
    write_text(given.output / "barrier.json", json.dumps({"steps": STEPS, "pairs": found}, indent=2) + "\n")
    draw(found, given.output / "barrier.png")
    Console().print(table(found))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [n, 64] in [0, 1] with labels: for training, and every fourth held out."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    held = torch.arange(len(x)) % 4 == 0
    return (x[~held], y[~held]), (x[held], y[held])


def network(width: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def trained(seed: int, width: int, epochs: int, x: Tensor, y: Tensor) -> nn.Sequential:
    """One network, its initialisation and batches drawn from a seed."""
    torch.manual_seed(seed)
    model = network(width)
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def curves(seed: int, width: int, epochs: int) -> Curves:
    """Held-out loss and accuracy along the line, by how the second network was aligned."""
    (x, y), (held_x, held_y) = digits()
    one, two = (trained(seed + k, width, epochs, x, y) for k in (0, 1))
    first, second = one.state_dict(), two.state_dict()
    symmetry = chain(first)
    orders = {
        "as they are": {},
        "matched by weights": match_weights(first, second, symmetry),
        "matched by activations": match_activations(one, two, symmetry, [x]),
    }
    ends = {name: apply(second, symmetry, order) for name, order in orders.items()}
    return {name: along(network(width), first, end, held_x, held_y) for name, end in ends.items()}


@torch.no_grad()
def along(model: nn.Module, first: State, second: State, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Loss and accuracy (%) at every step of the line."""
    points = [{name: torch.lerp(first[name], second[name], t) for name in first} for t in STEPS]
    logits = [torch.func.functional_call(model, point, (x,)) for point in points]
    right: Callable[[Tensor], float] = lambda out: 100 * float((out.argmax(1) == y).float().mean())  # noqa: E731
    return {"loss": [float(cross_entropy(out, y)) for out in logits], "accuracy": [right(out) for out in logits]}


def barrier(losses: Sequence[float]) -> float:
    """The largest rise above the straight line between the ends."""
    rises = [loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(STEPS, losses, strict=True)]
    return max(rises)


def table(found: Sequence[Curves]) -> Table:
    """Means over pairs, with the spread."""
    shown = Table(title=f"{len(found)} pairs, held-out digits")
    for column in ("second network", "barrier (nats)", "loss at the ends", "accuracy half way (%)"):
        shown.add_column(column)
    for name in found[0]:
        barriers = [barrier(pair[name]["loss"]) for pair in found]
        ends = [(pair[name]["loss"][0] + pair[name]["loss"][-1]) / 2 for pair in found]
        middle = [pair[name]["accuracy"][len(STEPS) // 2] for pair in found]
        shown.add_row(name, _spread(barriers, 3), _spread(ends, 3), _spread(middle, 1))
    return shown


def draw(found: Sequence[Curves], path: Path) -> None:
    """Loss and accuracy along the line: means, and every pair as a thin line."""
    inks = {
        "as they are": ("#7f93a6", "-"),
        "matched by weights": ("#c0392b", "-"),
        "matched by activations": ("black", ":"),
    }
    with style():
        figure = Figure(figsize=(8.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, (ink, dash) in inks.items():
            for axes, what in ((left, "loss"), (right, "accuracy")):
                lines = np.array([pair[name][what] for pair in found])
                axes.plot(STEPS, lines.T, color=ink, lw=0.6, alpha=0.4)
                axes.plot(STEPS, lines.mean(0), color=ink, ls=dash, lw=1.6, label=name)
        left.set(
            xlabel="from the first network to the second", ylabel="held-out loss (nats)", title="Loss along the line"
        )
        left.set_ylim(bottom=0)
        right.set(xlabel="from the first network to the second", ylabel="accuracy (%)", title="Accuracy along the line")
        left.legend(frameon=False, fontsize=7)
        save(figure, path)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


if __name__ == "__main__":
    main()
