"""Every task in plain text whose samples are made, by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from flashtrace_plugin.evaluation.tasks.english import ENGLISH
from flashtrace_plugin.evaluation.tasks.gym import GYM
from flashtrace_plugin.evaluation.tasks.ruler import RULER
from flashtrace_plugin.evaluation.tasks.steps import LONG_STEPS
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample

TEXT_TASKS: dict[str, Callable[[random.Random], TextSample]] = {**ENGLISH, **RULER, **LONG_STEPS, **GYM}
"""Makers of a sample from random numbers, for any tokenizer."""
