"""vLLM's own server, in an environment of its own, asked through the OpenAI client.

It is what `vllm serve` runs; that command itself is broken in the wheel for CPUs (0.32), which misses its own version.
"""

import base64
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
from PIL import Image

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("OCVTP_VLLM_ENV") or ROOT / ".vllm-env")
START_SECONDS = 600
NEW_TOKENS = 8


class Asked(NamedTuple):
    """A question about an image."""

    image: Image.Image
    text: str


class Answer(NamedTuple):
    """What came back."""

    text: str
    prompt_tokens: int


class Engine:
    """One server on a free port of this machine; within a `with`."""

    def __init__(
        self, model: Path, overrides: Mapping[str, Any], log: Path, *arguments: str, eager: bool = True
    ) -> None:
        port = free_port()
        self.log = log
        self.command = [
            str(ENVIRONMENT / "bin/python"), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32",
            "--limit-mm-per-prompt", '{"image": 1}', "--hf-overrides", _json(overrides),
            *(["--enforce-eager"] if eager else []), *arguments,
        ]  # fmt: skip
        self._url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> "Engine":
        self.begin()
        self.client = openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{self._url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"vLLM did not start:\n{self.said()[-4000:]}")
            time.sleep(0.5)

    def begin(self) -> None:
        """Start the process, whatever comes of it."""
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")},
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.log.parent,
                start_new_session=True,
            )  # fmt: skip

    def end(self) -> None:
        """Stop it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.end()

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def ask(self, asked: Asked, **more: Any) -> Answer:
        """One answer, greedy."""
        request = {
            "model": "tiny",
            "messages": [{"role": "user", "content": _content(asked)}],
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
            "extra_body": {"add_special_tokens": True},  # as a processor of transformers adds them
        }
        answer = self.client.chat.completions.create(**{**request, **more})
        return Answer(answer.choices[0].message.content or "", answer.usage.prompt_tokens)

    def ask_all(self, questions: Sequence[Asked], together: int, **more: Any) -> list[Answer]:
        """Answers in the order of the questions, so many asked at the same time."""
        with ThreadPoolExecutor(together) as pool:
            return list(pool.map(lambda asked: self.ask(asked, **more), questions))


def free_port() -> int:
    """One that no outgoing connection is given (those have 32768 and above), as minutes pass until vLLM takes it."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port from 20000 on is free")


def url_of(image: Image.Image) -> str:
    """A picture as the API takes it, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _content(asked: Asked) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url_of(asked.image)}}
    return [image, {"type": "text", "text": asked.text}]


def _json(value: Mapping[str, Any]) -> str:
    import json

    return json.dumps(value)
