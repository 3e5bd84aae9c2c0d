"""Run one side of the comparison in a separate process: `python -m components.bench.curation SIDE FOLDER`."""

import json
import sys
from pathlib import Path

from components.bench.curation import SIDES

if __name__ == "__main__":
    side, folder = sys.argv[1:]
    print("\n" + json.dumps(SIDES[side](Path(folder))))
