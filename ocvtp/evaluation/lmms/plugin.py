"""How lmms-eval finds our model: the entry point `lmms_eval.models`."""

from typing import Any


def manifests() -> list[Any]:
    """One model, `ocvtp`, which is asked in chat messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="ocvtp", chat_class_path="ocvtp.evaluation.lmms.adapter.OcvtpModel")]
