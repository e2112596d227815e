"""The examples at work on a tiny checkpoint: the embedding as a program, the service over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

import service
from magihuman_fast import MagiHumanPipeline
from magihuman_fast.codecs.sound_files import load_audio

ROOT = Path(__file__).resolve().parents[2]
ORDER = {"prompt": "He says hello.", "seconds": 1, "width": 64, "height": 64, "steps": 2}
Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> MagiHumanPipeline:
    return MagiHumanPipeline.from_pretrained(tiny_checkpoint, device="cpu")


def serve(app: FastAPI, talk: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            Client(transport=transport, base_url="http://test") as client,
        ):
            await talk(client)

    asyncio.run(asyncio.wait_for(run(), timeout=120))


async def ordered(client: Client, **changes: Any) -> str:
    answer = await client.post("/clips", json=ORDER | changes)
    assert answer.status_code == 202
    return str(answer.json()["id"])


async def events_of(client: Client, clip: str) -> list[tuple[str, dict[str, Any]]]:
    answer = await client.get(f"/clips/{clip}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


async def state_of(client: Client, clip: str) -> str:
    return str((await client.get(f"/clips/{clip}")).json()["state"])


def test_from_order_to_video(plain: MagiHumanPipeline, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.full((90, 120, 3), 99, np.uint8)).save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()

    async def talk(client: Client) -> None:
        clip = await ordered(client, image=image)
        told = await events_of(client, clip)
        assert [name for name, _ in told] == ["progress"] * 3 + ["done"]
        assert told[0][1] == {"stage": "denoise", "done": 1, "total": 2}
        assert told[2][1] == {"stage": "decode", "done": 1, "total": 1}
        assert await events_of(client, clip) == told  # also to whoever comes late
        assert (await client.get(f"/clips/{clip}")).json() == {"id": clip, "state": "done", "error": None}
        answer = await client.get(f"/clips/{clip}/video")
        assert answer.headers["content-type"] == "video/mp4"
        (tmp_path / "served.mp4").write_bytes(answer.content)
        (tmp_path / "picture.png").write_bytes(picture.getvalue())
        assert load_audio(tmp_path / "served.mp4", 44100).shape[1] >= 44100
        assert (await client.delete(f"/clips/{clip}")).status_code == 204
        assert (await client.get(f"/clips/{clip}")).status_code == 404

    serve(service.create_app(plain), talk)
    # The very bytes that the pipeline itself makes.
    arguments = {name: value for name, value in ORDER.items() if name != "prompt"}
    plain(str(ORDER["prompt"]), image=tmp_path / "picture.png", **arguments).save(tmp_path / "made.mp4")
    assert (tmp_path / "served.mp4").read_bytes() == (tmp_path / "made.mp4").read_bytes()


def test_queue(plain: MagiHumanPipeline) -> None:
    """Served in order; a full queue refuses; what is cancelled ends, waiting or running, and the next runs on."""

    async def talk(client: Client) -> None:
        long = await ordered(client, steps=100, width=128, height=128)
        second, third = await ordered(client), await ordered(client)
        refused = await client.post("/clips", json=ORDER)
        assert refused.status_code == 429
        assert refused.json()["detail"] == "3 clips are waiting already"
        assert (await client.get(f"/clips/{second}/video")).status_code == 409
        while await state_of(client, long) != "running":
            await asyncio.sleep(0.01)
        for clip in (second, long):
            assert (await client.delete(f"/clips/{clip}")).status_code == 204
            assert (await events_of(client, clip))[-1] == ("cancelled", {})
        assert (await events_of(client, third))[-1] == ("done", {})
        # Also that which ran: no step that ends later wakes it, and its place in the queue is free.
        assert [await state_of(client, clip) for clip in (second, long)] == ["cancelled"] * 2

    serve(service.create_app(plain, max_waiting=3), talk)


def test_old_clips_are_forgotten(plain: MagiHumanPipeline) -> None:
    async def talk(client: Client) -> None:
        clips = []
        for seed in (0, 2**63, 2**64 - 1):  # the last as large as any that ComfyUI draws
            clips.append(await ordered(client, seed=seed, steps=1))
            await events_of(client, clips[-1])
        assert (await client.get(f"/clips/{clips[0]}/video")).status_code == 404
        assert (await client.get(f"/clips/{clips[2]}/video")).status_code == 200

    serve(service.create_app(plain, max_kept=2), talk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": "  "}, "should match pattern"),
        ({"seconds": 99}, "less than or equal to 60"),
        ({"seed": 2**64}, "less than 18446744073709551616"),
        ({"sampler": "euler"}, "Extra inputs are not permitted"),
        ({"image": "???"}, "image: expected base64"),
        ({"image": "é"}, "image: expected base64"),
    ],
)
def test_bad_orders_are_refused(plain: MagiHumanPipeline, change: dict[str, Any], message: str) -> None:
    async def talk(client: Client) -> None:
        answer = await client.post("/clips", json=ORDER | change)
        assert answer.status_code == 422
        assert message in answer.text

    serve(service.create_app(plain), talk)


def test_what_the_pipeline_refuses_is_told(plain: MagiHumanPipeline) -> None:
    async def talk(client: Client) -> None:
        clip = await ordered(client, image=base64.b64encode(b"no picture").decode())
        name, data = (await events_of(client, clip))[-1]
        assert name == "failed"
        assert "expected" in data["error"]
        assert await state_of(client, clip) == "failed"

    serve(service.create_app(plain), talk)


def test_progress_arrives_while_the_clip_is_made(plain: MagiHumanPipeline) -> None:
    """Through a real server: the first event long before the last."""
    server = uvicorn.Server(uvicorn.Config(service.create_app(plain), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            clip = client.post("/clips", json=ORDER | {"steps": 100, "width": 128, "height": 128}).json()[
                "id"
            ]
            with client.stream("GET", f"/clips/{clip}/events") as answer:
                lines = answer.iter_lines()
                assert next(lines) == "event: progress"
                assert client.get(f"/clips/{clip}").json()["state"] == "running"
                client.delete(f"/clips/{clip}")
                assert "event: cancelled" in list(lines)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.mark.slow
def test_embedding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "embed.py"), str(tiny_checkpoint), "She says hello."]
    command += [str(tmp_path / "out.mp4"), "--seconds", "1", "--size", "64", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference path (PyTorch)" in done.stdout
    assert "denoise 8/8" in done.stdout
    assert (tmp_path / "out.mp4").stat().st_size > 1000
