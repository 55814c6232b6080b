"""P-Tuning v2: deep prompts, that is a prefix in front of the keys and values of every layer, for understanding.

    softmax(q·[P_k ; k]ᵀ) · [P_v ; v]      in every layer; P trained as it is, or P = MLP(P') with tanh

Liu et al., "P-Tuning v2", ACL 2022 (arXiv:2110.07602), section 3.2: "an optimized version of prefix-tuning" for
sequence and token classification and question answering, with a head in the place of the verbalizer.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveInt

from surgeon.passes.prefix import Prefix


class PTuningV2(Prefix):
    """Put deep prompts into every layer; 2·n·kv heads·head dim parameters a layer, beside the task's head.

    The task's head is the `head` technique, which a task with `labels` brings along; a question-answering base takes
    a `head` item. Length 0 is the base.
    """

    name: ClassVar[str] = "p_tuning_v2"
    title: ClassVar[str] = "P-Tuning v2"
    paper: ClassVar[str] = "arXiv:2110.07602"

    length: PositiveInt = Field(
        20, description="Prompt length n in every layer, free per task: below 20 for classes, about 100 for labelling."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the deep prompts, in training only.")
