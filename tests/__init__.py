"""Tests look at what the cards and rules say; tunings that come with jitmla would change that."""

import os

os.environ.setdefault("JITMLA_TUNINGS", "off")
