"""Define the thresholds above which a stage warns.

The report, which does not import torch, flags the same values.
"""

MUCH_TRUNCATED = 0.25  # share of texts that were truncated to the model's limits
# Share of real answers with a lower reward than a worthless one, above which a reward model counts as fooled.
# Half of what a coin gives: a model that orders two of three real pairs is sometimes fooled, but not by this
# as often.
FOOLED = 0.25
