"""A frozen VLM teaches a pruner by its answers: the loss `answers`."""

from ocvtp.answers.prompts import Prompt, generic, read_prompts, scene_questions
from ocvtp.answers.teacher import Teacher

__all__ = ["Prompt", "Teacher", "generic", "read_prompts", "scene_questions"]
