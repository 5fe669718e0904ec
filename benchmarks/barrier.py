"""The barrier between two networks of other initialisations: `python -m benchmarks.barrier --output barrier/`.

Trains pairs of networks on scikit-learn's digits, each with its own initialisation and order of images, and takes the
loss along the line from the one to the other: as they are, and after the second one's units were put into the order of
the first's (`adamerge.permutations`). The barrier is the largest rise of the loss above the straight line between its
ends. Beside the lines stand merges that lie on none: layers solved for by least squares (PLeaS), and units joined in
pairs (ZipIt!), in all layers or in the first alone, with an end for each network.

Networks are MLPs, or small convolutional ones with BatchNorm (`--network cnn`), whose statistics are taken anew at
every point of a line (REPAIR), or averaged.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

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
from adamerge.permutations import apply, chain, least_squares, match_activations, match_weights, recalibrate, zip_units

STEPS = [step / 24 for step in range(25)]
State = dict[str, Tensor]
Curves = dict[str, dict[str, list[float]]]
INKS = {
    "as they are": ("#7f93a6", "-"),
    "matched by weights": ("#c0392b", "-"),
    "matched by activations": ("black", ":"),
    "matched, statistics averaged": ("#e59866", "-"),
}
#: Of merges that lie on no line.
MARKS = {"least squares": "o", "joined in pairs": "s", "first layer joined": "^"}


def main(args: Sequence[str] | None = None) -> None:
    """Print barriers and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder for barrier.png and barrier.json")
    parser.add_argument("--network", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--width", type=int, default=256, help="of hidden layers; default: 256, a fourth in a cnn")
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--pairs", type=int, default=3, help="of networks; default: 3")
    given = parser.parse_args(args)
    found = [curves(2 * pair, given.width, given.epochs, given.network) for pair in range(given.pairs)]
    write_text(given.output / "barrier.json", json.dumps({"steps": STEPS, "pairs": found}, indent=2) + "\n")
    draw(found, given.output / "barrier.png")
    Console().print(table(found))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [n, 64] in [0, 1] with labels: for training, and every fourth held out."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    held = torch.arange(len(x)) % 4 == 0
    return (x[~held], y[~held]), (x[held], y[held])


def network(width: int, kind: str = "mlp") -> nn.Sequential:
    """Two hidden layers, or three of convolutions with BatchNorm."""
    if kind == "mlp":
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 10))
    width //= 4
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, stride in ((1, 1), (width, 2), (width, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


def trained(seed: int, width: int, epochs: int, x: Tensor, y: Tensor, kind: str = "mlp") -> nn.Sequential:
    """One network, its initialisation and batches drawn from a seed."""
    torch.manual_seed(seed)
    model = network(width, kind)
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


def curves(seed: int, width: int, epochs: int, kind: str = "mlp") -> Curves:
    """Held-out loss and accuracy along each line, by how the second network was aligned, and of merges on no line."""
    (x, y), held = digits()
    one, two = (trained(seed + k, width, epochs, x, y, kind) for k in (0, 1))
    first, second = one.state_dict(), two.state_dict()
    symmetry, model = chain(first), network(width, kind)
    orders = {
        "as they are": {},
        "matched by weights": match_weights(first, second, symmetry),
        "matched by activations": match_activations(one, two, symmetry, [x]),
    }
    ends = {name: apply(second, symmetry, order) for name, order in orders.items()}
    found = {}
    for name, end in ends.items():
        points = [{n: torch.lerp(t.float(), end[n].float(), step).to(t) for n, t in first.items()} for step in STEPS]
        found[name] = scores(model, points, x, held)
        if name == "matched by weights" and kind == "cnn":
            found["matched, statistics averaged"] = scores(model, points, None, held)
    two.load_state_dict(ends["matched by activations"])
    zipped = {"joined in pairs": None, "first layer joined": ["layer0"]}
    merges = {"least squares": [least_squares(one, two, [x])]}
    for name, labels in zipped.items():
        parts = zip_units(one, two, symmetry, [x], labels)
        merges[name] = [parts.state(0), parts.state(1)]
    return found | {name: scores(model, states, x, held) for name, states in merges.items()}


def scores(
    model: nn.Module, states: Sequence[State], batch: Tensor | None, held: tuple[Tensor, Tensor]
) -> dict[str, list[float]]:
    """Loss and accuracy (%) of every state, its BatchNorm taken anew on a batch unless that is None."""
    losses, accuracies = [], []
    for state in states:
        model.load_state_dict(state)
        model.eval()
        if batch is not None:
            recalibrate(model, [batch])
        with torch.no_grad():
            out = model(held[0])
        losses.append(float(cross_entropy(out, held[1])))
        accuracies.append(100 * float((out.argmax(1) == held[1]).float().mean()))
    return {"loss": losses, "accuracy": accuracies}


def barrier(losses: Sequence[float]) -> float:
    """The largest rise above the straight line between the ends."""
    rises = [loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(STEPS, losses, strict=True)]
    return max(rises)


def table(found: Sequence[Curves]) -> Table:
    """Means over pairs, with the spread; merges that lie on no line are held against the ends of the first."""
    shown = Table(title=f"{len(found)} pairs, held-out digits")
    for column in ("second network", "barrier (nats)", "loss at the ends", "accuracy half way (%)"):
        shown.add_column(column)
    ends = [(pair["as they are"]["loss"][0] + pair["as they are"]["loss"][-1]) / 2 for pair in found]
    for name in found[0]:
        losses, accuracies = ([pair[name][what] for pair in found] for what in ("loss", "accuracy"))
        if name in MARKS:
            rises = [fmean(loss) - end for loss, end in zip(losses, ends, strict=True)]
            middle = [fmean(accuracy) for accuracy in accuracies]
            shown.add_row(name, _spread(rises, 3), _spread(ends, 3), _spread(middle, 1))
        else:
            own = [(loss[0] + loss[-1]) / 2 for loss in losses]
            middle = [accuracy[len(STEPS) // 2] for accuracy in accuracies]
            shown.add_row(name, _spread([barrier(loss) for loss in losses], 3), _spread(own, 3), _spread(middle, 1))
    return shown


def draw(found: Sequence[Curves], path: Path) -> None:
    """Loss and accuracy along the lines: means, and every pair as a thin line; merges on no line as marks half way."""
    with style():
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for name in found[0]:
                values = np.array([pair[name][what] for pair in found])
                if name in MARKS:
                    place = 0.5 + 0.04 * (list(MARKS).index(name) - 1)
                    axes.plot(place, values.mean(), MARKS[name], color="#2471a3", ms=5, zorder=3, label=name)
                else:
                    ink, dash = INKS[name]
                    axes.plot(STEPS, values.T, color=ink, lw=0.6, alpha=0.4)
                    axes.plot(STEPS, values.mean(0), color=ink, ls=dash, lw=1.6, label=name)
            axes.set_xlabel("from the first network to the second")
        left, right = figure.axes
        left.set(ylabel="held-out loss (nats)", title="Loss along the line")
        left.set_ylim(bottom=0)
        right.set(ylabel="accuracy (%)", title="Accuracy along the line")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
        save(figure, path)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


if __name__ == "__main__":
    main()
