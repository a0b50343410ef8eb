"""Compare two runs of continued pre-training, with replay and without: what each learns and what it forgets.

python studies/finetuning/forgetting.py runs/continue_shakespeare runs/no_replay
"""

import argparse

from gptjax.metrics import read_metrics


def changes(run: str) -> dict[str, tuple[float, float]]:
    """Return each domain's validation loss before the first step and after the last."""
    rows = read_metrics(run)
    found = {name: [row[f"val/loss/{name}"] for row in rows if f"val/loss/{name}" in row] for name in ("old", "new")}
    return {name: (losses[0], losses[-1]) for name, losses in found.items()}


def main() -> None:
    """Print both runs' losses in nats a token, and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("replay")
    parser.add_argument("plain")
    args = parser.parse_args()
    replay, plain = changes(args.replay), changes(args.plain)
    for title, found in (("with replay", replay), ("without replay", plain)):
        losses = [f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in found.items()]
        print(f"{title}: {', '.join(losses)}")
    print(f"new domain's loss, with replay over without: {replay['new'][1] / plain['new'][1]:.4f}")
    rises = [after - before for before, after in (replay["old"], plain["old"])]
    print(f"old domain's rise: {rises[0]:.4f} with replay, {rises[1]:.4f} without, ratio {rises[0] / rises[1]:.3f}")


if __name__ == "__main__":
    main()
