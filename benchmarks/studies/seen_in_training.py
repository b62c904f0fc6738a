"""Writes into the card of a trained model what its training scans measured, without training it again.

    python benchmarks/studies/seen_in_training.py MODEL DATA
    python benchmarks/studies/seen_in_training.py flair-anomaly lgg_flair --no-lengths

A training does the same at its end (`medseg_diffusion.workflows.training_scans`). This is for models that are older,
and for those whose label maps or synthesis have changed. DATA is the folder of the training; held-out scans are left
out, as the card says. Weights and README.md stay as they are.
"""

from __future__ import annotations

import argparse
import json

from medseg_diffusion.workflows.training_scans import store_seen


def main() -> None:
    """Parse the arguments, measure the scans, and print the entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory, run folder or installed name")
    parser.add_argument("data", help="folder of the data that it was trained on")
    parser.add_argument("--no-lengths", action="store_true", help="the voxel sizes of the data are made up")
    arguments = parser.parse_args()
    seen = store_seen(
        arguments.model,
        arguments.data,
        lengths=not arguments.no_lengths,
        on_scan=lambda done, total: print(f"\r{done} of {total} scans", end="", flush=True),
    )
    print()
    print(json.dumps(seen.entry(), indent=2))


if __name__ == "__main__":
    main()
