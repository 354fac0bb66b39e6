"""The rollout engine: token ids and lengths in, token ids, lengths and log-probs out."""

from alignjax.generate.call import OnTokens as OnTokens
from alignjax.generate.call import Progress as Progress
from alignjax.generate.engine import make_generate as make_generate
from alignjax.generate.logps import SequenceLogps as SequenceLogps
from alignjax.generate.logps import make_sequence_logps as make_sequence_logps
