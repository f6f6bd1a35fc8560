"""A frozen VLM teaches a pruner by its answers: the loss `answers`."""

from ocvtp.answers.asking import Prompt, generic, read_prompts, scene_questions
from ocvtp.answers.teacher import Teacher, teacher_of

__all__ = ["Prompt", "Teacher", "generic", "read_prompts", "scene_questions", "teacher_of"]
