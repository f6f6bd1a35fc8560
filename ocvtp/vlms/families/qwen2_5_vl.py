"""Qwen2.5-VL: most blocks of the tower attend in windows, and patches go through it in the order of these."""

from torch import Tensor

from ocvtp.vlms.native import NativeFamily


class Qwen25VLFamily(NativeFamily):
    """`Qwen2_5_VLForConditionalGeneration`."""

    def order(self, sizes: Tensor) -> Tensor:
        """Window by window."""
        from transformers import vision_utils

        tower = self.tower
        order_N: Tensor
        order_N, _ = vision_utils.get_vision_window_index(
            sizes, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        return order_N
