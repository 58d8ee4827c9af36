"""Name the folders that tests read: the project's root, and data that is not part of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"  # real data and models; a test that needs it is skipped where it is missing
