"""``rcp-kernels generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import Device, ModelDType, ModelName, Threads, torch_dtype

__all__ = ["EXAMPLES", "generate"]

EXAMPLES = """Example:

rcp-kernels generate out --prompt "What is the capital of France?" --temperature 0.7 --seed 1"""


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue, or a question.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Add at most so many tokens.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt into the model's chat template, if it has one.")
    ] = True,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", help="Sample tokens from logits divided by this; the default takes the likeliest token."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample among the likeliest tokens that together have this probability."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Sample the same tokens again with the same seed.")
    ] = None,
    device: Device = None,
    dtype: ModelDType = None,
    threads: Threads = None,
) -> None:
    """Continue a prompt: with the likeliest tokens, or with sampled ones if a sampling option is given."""
    if not prompt:
        raise typer.BadParameter("--prompt needs a text, got an empty one; pass what to continue")
    from ..pipeline.generate import check_sampling
    from ..pipeline.generate import generate as run

    try:
        check_sampling(temperature, top_p, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(
        run(
            model,
            prompt,
            new_tokens=new_tokens,
            chat=chat,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            device=device,
            dtype=torch_dtype(dtype),
        )
    )
