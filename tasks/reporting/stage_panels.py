"""Say what the charts and tables of each stage show, with one sentence on how to read each chart."""

from collections.abc import Mapping
from typing import NamedTuple


class Panel(NamedTuple):
    """One chart: its metrics with their labels. Metrics that a stage did not log are left out.

    A name that ends in * is every metric that begins so, with the rest of its name as its label.
    """

    title: str
    metrics: Mapping[str, str]
    note: str
    bounds: tuple[float, float] | None = None
    only_if_it_moves: bool = False


TITLES = {
    "pretrain": (
        "Base model",
        "A small Llama, trained from scratch on the fine-tuning questions and all their answers.",
    ),
    "sft": ("Supervised fine-tuning", "Fine-tuned on the best answer of each question."),
    "merge": ("Merge", "The adapter folded into the base; every later stage starts from the result."),
    "reference": (
        "Reference",
        "The SFT model's log-probability of every answer that DPO compares, computed once.",
    ),
    "reward": ("Reward model", "Learns from pairs of answers which one the voters preferred."),
    "ppo": (
        "PPO",
        "The policy samples answers, the reward model scores them, a KL penalty keeps it near the SFT model.",
    ),
    "dpo": ("DPO", "Learns from the same pairs without a reward model; the SFT model is its reference."),
}

HELD_OUT = "held_out_loss"  # logged now and then, not at every step
LOSSES = {"loss": "training", HELD_OUT: "held-out"}

PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (
        Panel(
            "Loss", {"loss": "loss"}, "Cross-entropy of the next token in nats; it should fall and level off."
        ),
    ),
    "sft": (
        Panel(
            "Loss", LOSSES, "Cross-entropy of the answers' tokens in nats; e raised to it is the perplexity."
        ),
    ),
    "reward": (
        Panel("Loss", LOSSES, "Log-loss of the preferred answer; guessing costs 0.693."),
        Panel(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Share of the batch's pairs ordered as the votes do; guessing gets one half.",
            (0, 1),
        ),
    ),
    "ppo": (
        Panel(
            "Reward",
            {"reward": "reward"},
            "Normalised score of the sampled answers: 0 is an average reference answer, 1 a standard "
            "deviation better.",
        ),
        Panel(
            "Parts of the reward",
            {"reward_*": ""},
            "Mean of each reward before it is weighted; one that falls while the sum rises is traded away.",
        ),
        Panel(
            "KL from the SFT model",
            {"kl": "k1", "kl_k3": "k3"},
            "How far the policy has moved, in nats a response; two estimators (k1 unbiased, k3 never "
            "negative) that should agree.",
        ),
        Panel(
            "Entropy",
            {"entropy_estimate": "entropy"},
            "Nats a token the policy is undecided by; a collapse to 0 means it repeats itself.",
        ),
        Panel(
            "Length",
            {"length": "tokens"},
            "Mean tokens of an answer; a steady climb often means that length, not quality, is rewarded.",
        ),
        Panel(
            "Ended answers",
            {"ended": "share"},
            "Share of answers that end by themselves before the length limit.",
            (0, 1),
        ),
        Panel(
            "Repetition",
            {"repeated_4grams": "repeated"},
            "Share of runs of four tokens that an answer has had before; it climbs when a policy loops.",
            only_if_it_moves=True,
        ),
        Panel(
            "Text mixed in",
            {"text_loss": "loss"},
            "Next-token loss of the text of PPO-ptx, in nats; it should not rise.",
        ),
        Panel(
            "Clip fraction",
            {"clip_fraction": "policy"},
            "Share of tokens whose probability moved past the clip range in an update; above 0.3 steps are "
            "too long.",
        ),
        Panel(
            "Update size",
            {"approx_kl": "KL"},
            "KL of an update from the policy that sampled, in nats a token; large values mean steps too "
            "long.",
        ),
        Panel(
            "Value loss",
            {"value_loss": "loss"},
            "Half the squared error of the critic's forecast of the return.",
        ),
        Panel(
            "Explained variance",
            {"explained_variance": "share"},
            "Share of the returns' variance that the critic foresees; 1 is perfect, below 0 worse than none.",
        ),
        Panel(
            "Independent score",
            {"independent_score": "score"},
            "Of answers to prompts that PPO does not learn from, by what it does not maximise; a fall while "
            "the reward rises is over-optimisation.",
        ),
        Panel(
            "Gradient norm",
            {"gradient_norm": "policy"},
            "Norm of the policy's gradient before clipping; a jump far above its range is a spike.",
        ),
        Panel(
            "KL coefficient",
            {"kl_coefficient": "beta"},
            "Weight of the KL penalty, as the controller or a guard set it.",
            None,
            True,
        ),
        Panel(
            "Skipped updates",
            {"skipped": "updates"},
            "Updates left out because the policy had moved too far from the sampler.",
            None,
            True,
        ),
    ),
    "dpo": (
        Panel(
            "Loss", LOSSES, "Log-loss of the preferred answer under the implicit reward; it starts at 0.693."
        ),
        Panel(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Share of pairs that the implicit reward orders as the votes do.",
            (0, 1),
        ),
        Panel(
            "Implicit reward",
            {"margin": "margin", "chosen_reward": "preferred"},
            "Preferred minus other answer, which should grow, and preferred alone; below 0 that became "
            "less likely than under SFT.",
        ),
        Panel(
            "Best answers",
            {"nll": "nats"},
            "Negative log-likelihood a token of the questions' best answers: the likelihood term holds it "
            "down.",
        ),
    ),
}

FACTS = {  # shown in this order
    "pretrain.loss": "last training loss",
    "pretrain.parameters": "parameters",
    "sft.held_out_loss": "held-out loss",
    "sft.best_step": "step with the lowest held-out loss",
    "sft.perplexity": "held-out perplexity",
    "sft.packing_leak": "leak between packed documents",
    "sft.prompts_cut": "prompts cut to the limit",
    "sft.answers_cut": "answers cut to the limit",
    "merge.drift_max": "largest change of a logit",
    "merge.drift_mean": "mean change of a logit",
    "merge.top1_agreement": "tokens with the same likeliest successor",
    "merge.answers_reproduced": "test texts continued alike",
    "merge.reward_drift_max": "largest change of a reward",
    "merge.order_reproduced": "test texts ranked alike",
    "reference.log_prob": "mean log-probability of a token, nats",
    "reward.held_out_loss": "held-out loss",
    "reward.best_step": "step with the lowest held-out loss",
    "reward_accuracy.votes": "pairs ordered as the votes",
    "reward_accuracy.length_matched": "of those of like length",
    "reward_accuracy.longer_wins": 'by the rule "the longer wins"',
    "reward_accuracy.over_longer_wins": 'more than the rule "the longer wins"',
    "reward_accuracy.older_wins": 'by the rule "the older wins"',
    "reward_accuracy.over_older_wins": 'more than the rule "the older wins"',
    "reward_accuracy.rules_together": "by both rules, weighed by the training pairs",
    "reward_accuracy.over_rules_together": "more than both rules together",
    "reward_accuracy.knowing_age": "pairs ordered as the votes, knowing which answer was first",
    "reward_accuracy.knowing_age_over_longer_wins": 'that, more than the rule "the longer wins"',
    "reward_accuracy.knowing_age_over_older_wins": 'that, more than the rule "the older wins"',
    "reward_accuracy.knowing_age_over_rules_together": "that, more than both rules together",
    "reward_accuracy.probe": "by the head alone, before training",
    "reward_accuracy.probe_knowing_age": "by that, knowing which answer was first",
    "reward.length_correlation": "rank correlation of reward and length",
    "reward.ece": "calibration error",
    "reward.ece_floor": "that of a perfect model, by chance",
    "reward.ece_uncalibrated": "before calibration",
    "reward.temperature": "temperature",
    "reward.worst_attack": "real answers out-scored by the worst attack",
    "reward.wrong_name": "real answers out-scored by a copy with a wrong name",
    "reward.elsewhere_correlation": "correlation of rewards at the own and another question",
    "reward.made_comparisons": "comparisons made without people",
    "reward.mean": "mean reward of reference answers",
    "reward.std": "their standard deviation",
    "reward.prompts_cut": "prompts cut to the limit",
    "reward.answers_cut": "answers cut to the limit",
    "reward.pairs_equal_once_cut": "pairs left out: equal once cut",
    "ppo.rollout_reward": "reward of the last batch",
    "ppo.rollout_kl": "KL of the last batch",
    "ppo.rollout_length": "tokens of its answers",
    "ppo.rollout_ended": "of them ended by themselves",
    "ppo.independent_score.sft": "independent score of the SFT model",
    "ppo.independent_score.best": "best independent score",
    "ppo.best_step": "step with the best independent score",
    "ppo.independent_score.final": "last independent score",
    "ppo.kept_step": "step of the weights handed on",
    "ppo.prompts_cut": "prompts cut to the limit",
    "dpo.held_out_loss": "held-out loss",
    "dpo.best_step": "step with the lowest held-out loss",
    "dpo.implicit_accuracy": "pairs ordered as the votes",
    "dpo.prompts_cut": "prompts cut to the limit",
    "dpo.answers_cut": "answers cut to the limit",
    "dpo.pairs_equal_once_cut": "pairs left out: equal once cut",
}
