"""Makes the tests' own modules (`compare`, `golden`, fakes) importable by name."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent
for folder in (TESTS, TESTS / "unit"):
    sys.path.insert(0, str(folder))
