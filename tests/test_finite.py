"""Pictures with NaN or infinite values: named by the report, refused by whoever saves pictures, never written as black ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from tiny import tiny_inputs, tiny_pipeline
from tiny_transformers import tiny_inputs as transformer_inputs
from tiny_transformers import tiny_pipeline as tiny_transformer

import diffaccel
from diffaccel.engine.clock import Clock
from diffaccel.engine.finite import BrokenPicture, broken_pictures, decoded_pictures, watch_pictures
from diffaccel.engine.flops import FlopLedger
from diffaccel.engine.report import refuse_broken
from diffaccel.engine.run import Run
from diffaccel.engine.seams import Seams
from diffaccel.measure.runner import PLAIN, Contestant, Measurement, broken_notes

IGNORED = "ignore:invalid value encountered in cast"  # numpy's, when diffusers makes a black picture of NaN


def called(pipe, inputs, **more):
    fast = diffaccel.wrap(pipe, "off")
    fast(**{**inputs, **more})
    return fast.report


def spoil(inputs, row, value=float("nan")):
    """The text of one picture makes its noise prediction NaN."""
    embeds = inputs["prompt_embeds"].clone()
    embeds[row] = value
    return {**inputs, "prompt_embeds": embeds}


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_the_report_names_the_pictures(output_type):
    inputs = tiny_inputs("sd", images=3, steps=2)
    assert called(tiny_pipeline("sd"), inputs, output_type=output_type).broken == ()
    report = called(tiny_pipeline("sd"), spoil(inputs, 1), output_type=output_type)
    assert (report.broken, report.images) == ((1,), 3)
    assert report.notes[-1].startswith("picture 2 of 3 holds values that are not finite")
    with pytest.raises(BrokenPicture, match=r"picture 2 of 3 holds .* float32 often helps"):
        refuse_broken(report)


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_decoder_that_overflows_is_found_behind_good_latents(value):
    """As the autoencoder of Stable Diffusion XL does in float16."""
    pipe = tiny_pipeline("sd")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = value
    report = called(pipe, tiny_inputs("sd", images=2, steps=1), output_type="pil")
    assert report.broken == (0, 1)
    assert report.notes[-1].startswith("2 of 2 pictures hold")


@pytest.mark.filterwarnings(IGNORED)
def test_one_picture_is_not_counted():
    report = called(tiny_pipeline("sd"), spoil(tiny_inputs("sd", steps=1), 0), output_type="pil")
    with pytest.raises(BrokenPicture, match=r"^the picture holds values that are not finite"):
        refuse_broken(report)
    refuse_broken(None)  # no call yet


@pytest.mark.parametrize("kind", ["wan", "flux-schnell"])
def test_latents_that_no_processor_saw_are_looked_at_as_the_result(kind):
    pipe, inputs = tiny_transformer(kind), transformer_inputs(kind, batch=2, steps=1)
    assert called(pipe, inputs, output_type="latent").broken == ()
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    report = called(pipe, inputs, output_type="latent")
    assert (report.broken, report.images) == ((0, 1), 2)


def test_one_bad_frame_breaks_its_video():
    class Pipe:
        video_processor = VideoProcessor()

    run, videos = Run(Clock(None), FlopLedger(), ()), torch.zeros(2, 3, 4, 8, 8)
    videos[1, 0, 2, 5, 5] = float("inf")
    with Seams() as seams:
        watch_pictures(Pipe, run, seams)
        Pipe.video_processor.postprocess_video(videos, output_type="np")
    assert (broken_pictures(run), decoded_pictures(run)) == ((1,), 2)
    run.finite, run.images = [True, True, True, False], 2  # a pipeline that decodes frame by frame
    assert (broken_pictures(run), decoded_pictures(run)) == ((1,), 2)


def test_a_comparison_names_who_made_them():
    inputs = tiny_inputs("sd", images=2, steps=1)
    good, bad = (called(tiny_pipeline("sd"), given, output_type="pt") for given in (inputs, spoil(inputs, 1)))
    found = [
        Measurement(Contestant(name, "recipe", PLAIN, 1), reports=[good, report])
        for name, report in (("a", good), ("b", bad))
    ]
    assert [note.split(";")[0] for note in broken_notes(found)] == [
        "b: 1 of its pictures hold values that are not finite (NaN or infinite)"
    ]


def test_nothing_is_left_on_the_processor():
    pipe = tiny_pipeline("sd")
    before = dict(vars(pipe.image_processor))
    called(pipe, tiny_inputs("sd", steps=1))
    assert vars(pipe.image_processor) == before
    assert np.isfinite(pipe(**tiny_inputs("sd", steps=1)).images).all()
