"""Link the artifacts of runs that are on W&B by who made and who read them: after ``wandb sync`` of offline runs.

    wandb sync outputs/wandb/wandb/offline-run-*
    python pipelines/link.py [--project pmpd] [--entity NAME] [--dir outputs/wandb]

Offline, W&B refuses to link, so every run carries its lineage as keys; this makes artifacts of them, which refer to the
store and copy nothing. It may be given again: what is linked stays as it is.
"""

from __future__ import annotations

import argparse
import logging
import sys

from pmpd.tracking import link

log = logging.getLogger("pmpd.link")


def main() -> int:
    """Command line; 1 where W&B does not answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="pmpd")
    parser.add_argument("--entity")
    parser.add_argument("--dir", default="outputs/wandb", help="tracking.dir of the runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        linked = link(given.dir, given.project, given.entity)
    except Exception as error:  # W&B's failures share no base class
        log.error("error: W&B refuses or does not answer: %s: %s", type(error).__name__, error)
        return 1
    log.info("%d runs linked: %s", len(linked), ", ".join(linked) or "nothing was left to link")
    return 0


if __name__ == "__main__":
    sys.exit(main())
