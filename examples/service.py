"""Prediction service for one adapter: POST /predict takes texts with or without their source texts.

    pip install -r examples/requirements-service.txt
    FLARE_ADAPTER=runs/acehnese/flare/seed-0 uvicorn --factory service:app --app-dir examples
    curl localhost:8000/predict -H "Content-Type: application/json" \
         -d '{"texts": ["Nyo beutoi."], "source_texts": ["Yeah, that is right."]}'

Set FLARE_BASE if the base model is not where the adapter's configuration says. If requests may lack source texts, set
FLARE_TRANSLATOR to an encoder-decoder that translates texts into the source language. A process holds one model and
predicts one request at a time. Other requests wait in threads, so that /health still answers. For more throughput,
start more processes or send more texts per request.
"""

import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

import flare
from flare.experiments.utils.errors import UserError


class Request(BaseModel):
    """The body of POST /predict."""

    texts: list[str | dict[str, str]] = Field(min_length=1, max_length=256)
    source_texts: list[str | dict[str, str] | None] | None = None


def make_app(pipeline: flare.FlarePipeline) -> FastAPI:
    """Return an application that serves a pipeline."""
    application = FastAPI(title="FLARE")

    @application.get("/health")
    def health() -> dict[str, str]:
        return {"adapter": str(pipeline.trained.folder), "base": pipeline.trained.base}

    @application.post("/predict")
    def predict(request: Request) -> dict[str, list]:  # not async: FastAPI runs it in a thread
        try:
            return {"predictions": pipeline(request.texts, request.source_texts)}
        except (UserError, TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error

    return application


def app() -> FastAPI:
    """Return the application for uvicorn --factory. Environment variables name the adapter, base and translator."""
    base, translator = os.environ.get("FLARE_BASE"), os.environ.get("FLARE_TRANSLATOR")
    return make_app(flare.FlarePipeline.from_pretrained(os.environ["FLARE_ADAPTER"], base, translator))
