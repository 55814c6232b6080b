"""What a failure stems from, where the sweep's own words do not say: read in the model's code, in a line each.

A line stands in place of the error of its step, where there is one: no verdict hangs on it.
"""

from __future__ import annotations

_LOOP = "trace: the model loops over tokens in Python, which torch.export writes out for one number of them"
_LIST = "trace: the model lists positions in Python, one by one, which torch.export takes for a fixed number"
_EXPERTS = "trace: the model loops over the experts that were hit, whose number hangs on data: torch.export takes none"
_GLOBAL = "trace: the model asks the data whether a token attends to all, and torch.export takes no branch on data"
_CODEBOOKS = "build: the model reads several codebooks a token, ids [batch · codebooks, tokens], no text's"
_KEYS = "build: an assistant, which answers only to the keys and values of the model that it drafts for"
_IMAGES = "anatomy: convolutions only, no Transformer: "

CAUSES: dict[str, str] = {
    "bit": f"{_IMAGES}each standardises its weight at every call, so that none meets the data as it is stored",
    "blt": "trace: the model cuts a text into patches whose number torch.export takes for fixed",
    "bros": "build: the model asks for the boxes of words on their page (bbox), which no text has",
    "canine": "trace: the model loops over windows of the text, which torch.export writes out for one number of them",
    "cpmant": _LIST,
    "dbrx": _EXPERTS,
    "deepseek_v4": "anatomy: refused: four residual streams, which a matrix made of the data mixes at every join",
    "dinat": "build: needs the package natten, which is compiled for a GPU",
    "efficientnet": f"{_IMAGES}its configuration counts four layers a block",
    "falcon_mamba": _LOOP,
    "fsmt": "trace: the model asks the data whether a token is padding, and torch.export takes no branch on data",
    "funnel": _LIST,
    "gemma3n": "build: the tower of images needs the package timm",
    "gemma3n_text": "trace: the model makes a distribution at each call, whose constants torch.export cannot hold",
    "gemma4_assistant": _KEYS,
    "gemma4_unified_assistant": _KEYS,
    "hgnet_v2": f"{_IMAGES}most blocks concatenate what they make, two of its stages add a residual",
    "ibert": "trace: the model asks the data how they are to be quantised, and torch.export takes no branch on data",
    "jamba": _LOOP,
    "layoutlmv2": "build: needs the package detectron2",
    "led": _GLOBAL,
    "lilt": "prefix: refused: the attentions of text and of boxes add their scores to each other's",
    "longcat_flash": _EXPERTS,
    "longformer": _GLOBAL,
    "mamba": _LOOP,
    "mobilenet_v1": f"{_IMAGES}refused: a chain without one residual",
    "mra": "anatomy: without its CUDA kernel the model's attention is zeros: there is none to find",
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "nllb-moe": _EXPERTS,
    "pp_lcnet": "build: the model gives what its classifier says as a hidden state, not as logits",
    "qwen4_exp": "build: its configuration leaves open what its indexer may read (indexer_budget)",
    "qwen4_exp_text": "trace: a token sees whole blocks of what the data leave visible: sizes that hang on data",
    "recurrent_gemma": _LOOP,
    "reformer": "trace: in training the model takes texts of the one length that its axial positions multiply to",
    "rwkv": _LOOP,
    "shieldgemma2": "build: the model reads the logits of tokens 10,784 and 3,771, which a small vocabulary has not",
    "siglip2": "build: the model takes patches, a mask over them and their shapes, no image",
    "squeezebert": "anatomy: refused: its projections are convolutions in groups over [features, tokens]",
    "switch_transformers": _EXPERTS,
    "textnet": f"{_IMAGES}refused: a chain without one residual",
    "timm_wrapper": "build: needs the package timm",
    "voxtral_realtime": "build: the model takes a sound beside its text",
    "xlstm": _LOOP,
    "zamba": _LOOP,
}


def told(family: str, cause: str) -> str:
    """The cause of a family's failure, read in its code where the step is the one it was read for."""
    known = CAUSES.get(family, "")
    return known if known.partition(":")[0] == cause.partition(":")[0] and known else cause
