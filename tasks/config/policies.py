"""Name the policies of a run. The orders matter: they decide what is compared with what, and ties."""

TUNED = ("dpo", "ppo")  # in the order in which they are trained and sampled
TRAINED = ("ppo", "dpo")  # what a run may promote; of two equally good ones the first
POLICIES = ("base", "sft", *TUNED)
PREDECESSOR = "predecessor"  # the policy of the last round that has not lost, in a run of rounds
COMPARED = ("base", "sft", "champion", PREDECESSOR, *TUNED)  # each is compared with those before it
TITLES = {"base": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", PREDECESSOR: "the earlier round"}
