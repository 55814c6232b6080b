"""The peer of `benchmarks.serving`: what one writes with FastAPI and PEFT. Tasks come from a folder, few are held."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from peft import PeftModel
from pydantic import BaseModel
from tokenizers import Tokenizer

from benchmarks.bases import open_model

RESIDENT = 64


class Ask(BaseModel):
    """A request."""

    task: str
    text: str


def make_app(folder: Path, tokenizer: Path, base: str) -> FastAPI:
    """One model, one lock: PEFT's adapters are switched in place."""
    model = open_model(base)
    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    held: OrderedDict[str, None] = OrderedDict()
    peft: list[PeftModel] = []
    lock = threading.Lock()
    app = FastAPI()

    def activate(task: str) -> PeftModel:
        if not peft:
            peft.append(PeftModel.from_pretrained(model, str(folder / task), adapter_name=task).eval())
        elif task not in held:
            if len(held) >= RESIDENT:
                peft[0].delete_adapter(held.popitem(last=False)[0])
            peft[0].load_adapter(str(folder / task), adapter_name=task)
        held[task] = None
        held.move_to_end(task)
        peft[0].set_adapter(task)
        return peft[0]

    @app.post("/infer")
    def infer(ask: Ask) -> dict[str, list[float]]:
        ids = torch.tensor([words.encode(ask.text).ids])
        with lock, torch.inference_mode():
            logits = activate(ask.task)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return {"logits": logits[0].tolist()}

    return app


if __name__ == "__main__":
    adapters, tokenizer_, base_, threads, port = sys.argv[1:]
    torch.set_num_threads(int(threads))
    application = make_app(Path(adapters), Path(tokenizer_), base_)
    uvicorn.run(application, host="127.0.0.1", port=int(port), log_level="warning")
