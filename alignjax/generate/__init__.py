"""The rollout engine: token ids and lengths in, token ids, lengths and log-probs out."""

from alignjax.generate.engine import make_generate as make_generate
