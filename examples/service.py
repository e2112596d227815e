"""A web service around one pipeline: clips wait in a queue, progress comes as server-sent events, the answer is an mp4.

    pip install "magihuman_fast[service]"
    python examples/service.py DIR --sr 540p --port 8000

    curl -X POST localhost:8000/clips -H 'Content-Type: application/json' -d '{"prompt": "He says hello.", "seed": 7}'
    curl -N localhost:8000/clips/ID/events      # event: progress, data: {"stage": "denoise", "done": 1, "total": 8}
    curl localhost:8000/clips/ID/video --output clip.mp4
    curl -X DELETE localhost:8000/clips/ID

It knows no users and keeps the last clips only: put it behind what you have for both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from magihuman_fast import MagiHumanError, MagiHumanPipeline

MAX_IMAGE_BYTES = 16 << 20


class Order(BaseModel):
    """What a client asks for; the limits are the pipeline's own, which checks them again."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=20_000, pattern=r"\S")
    image: str | None = Field(
        None, max_length=MAX_IMAGE_BYTES * 4 // 3 + 4, description="a file's bytes in base64"
    )
    seconds: float = Field(5, ge=1, le=60)
    width: int = Field(448, ge=64, le=4096)
    height: int = Field(256, ge=64, le=4096)
    seed: int = Field(42, ge=0, lt=2**64)
    steps: int | None = Field(None, ge=1, le=100)


@dataclass
class Clip:
    """One order on its way, with everything told about it so far."""

    id: str
    folder: Path
    state: str = "waiting"  # then running, and done, failed or cancelled
    error: str | None = None
    events: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def video(self) -> Path:
        return self.folder / f"{self.id}.mp4"

    @property
    def image(self) -> Path:
        return self.folder / f"{self.id}.image"

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def tell(self, name: str, **data: object) -> None:
        self.events.append(f"event: {name}\ndata: {json.dumps(data)}\n\n")
        # Whoever waits is woken; whoever comes later waits for the next.
        self.changed.set()
        self.changed = asyncio.Event()

    def finish(self, state: str, error: str | None = None) -> None:
        self.state, self.error = state, error
        self.tell(state, **({} if error is None else {"error": error}))

    def forget(self) -> None:
        for path in (self.video, self.image):
            path.unlink(missing_ok=True)


def create_app(pipe: MagiHumanPipeline, *, max_waiting: int = 16, max_kept: int = 64) -> FastAPI:
    """The service: at most `max_waiting` clips wait or run, the last `max_kept` are kept."""
    clips: dict[str, Clip] = {}
    folder: list[Path] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory() as name:
            folder.append(Path(name))
            yield
            tasks = [clip.task for clip in clips.values() if clip.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            folder.clear()

    app = FastAPI(title="magihuman_fast", lifespan=lifespan)

    async def make(clip: Clip, options: dict[str, Any]) -> None:
        def on_step(stage: str, done: int, total: int) -> None:
            clip.state = "running"
            clip.tell("progress", stage=stage, done=done, total=total)

        try:
            result = await pipe.generate_async(on_step=on_step, **options)
            saved = asyncio.ensure_future(asyncio.to_thread(result.save, clip.video))
            try:
                await asyncio.shield(saved)
            except asyncio.CancelledError:
                await asyncio.wait([saved])  # a thread cannot be stopped: its file goes when it is there
                clip.video.unlink(missing_ok=True)
                raise
            clip.finish("done")
        except asyncio.CancelledError:
            clip.finish("cancelled")
        except MagiHumanError as error:  # it says what was wrong with the order
            clip.finish("failed", str(error))
        except Exception as error:
            clip.finish("failed", f"internal error: {type(error).__name__}")
            raise
        finally:
            clip.image.unlink(missing_ok=True)

    def find(clip_id: str) -> Clip:
        if clip_id not in clips:
            raise HTTPException(404, f"no clip {clip_id!r}")
        return clips[clip_id]

    @app.post("/clips", status_code=202)
    async def order(order: Order) -> dict[str, str]:
        if sum(not clip.over for clip in clips.values()) >= max_waiting:
            raise HTTPException(429, f"{max_waiting} clips are waiting already", {"Retry-After": "30"})
        clip = Clip(uuid.uuid4().hex, folder[0])
        options = order.model_dump(exclude={"image"})
        if order.image is not None:
            try:
                data = base64.b64decode(order.image, validate=True)
            except ValueError as error:  # binascii.Error is one; text that is not ASCII another
                raise HTTPException(422, f"image: expected base64: {error}") from error
            clip.image.write_bytes(data)
            options["image"] = clip.image
        for old in [c for c in clips.values() if c.over][: max(0, len(clips) + 1 - max_kept)]:
            clips.pop(old.id).forget()
        clips[clip.id] = clip
        clip.task = asyncio.create_task(make(clip, options))
        return {"id": clip.id}

    @app.get("/clips/{clip_id}")
    async def status(clip_id: str) -> dict[str, str | None]:
        clip = find(clip_id)
        return {"id": clip.id, "state": clip.state, "error": clip.error}

    @app.get("/clips/{clip_id}/events")
    async def events(clip_id: str) -> StreamingResponse:
        """Everything told so far, then everything that follows, until the clip is over."""
        clip = find(clip_id)

        async def stream() -> AsyncIterator[str]:
            told = 0
            while True:
                changed = clip.changed
                while told < len(clip.events):
                    yield clip.events[told]
                    told += 1
                if clip.over:
                    return
                # Something may have been told while the client took what it was sent.
                if changed is clip.changed:
                    await changed.wait()

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    @app.get("/clips/{clip_id}/video")
    async def video(clip_id: str) -> FileResponse:
        clip = find(clip_id)
        if clip.state != "done":
            raise HTTPException(409, f"the clip is {clip.state}")
        return FileResponse(clip.video, media_type="video/mp4", filename=f"{clip.id}.mp4")

    @app.delete("/clips/{clip_id}", status_code=204)
    async def cancel(clip_id: str) -> None:
        """End a clip after the step that runs, or forget one that is over."""
        clip = find(clip_id)
        if clip.over:
            clips.pop(clip_id).forget()
        elif clip.task is not None:
            clip.task.cancel()

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve one pipeline over HTTP.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--sr", choices=("540p", "1080p"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    pipe = MagiHumanPipeline.from_pretrained(args.model, sr=args.sr)
    pipe.setup()
    uvicorn.run(create_app(pipe), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
