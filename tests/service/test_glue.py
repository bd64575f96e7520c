"""The traced surroundings of the trunk say what the defense says, for any batch."""

import pytest
import torch

from defense import DefendedClassifier, SplitClassifier
from service.glue import Epilogue, Prologue, to_images, traced
from toy_models import importance_of, small_conv_net


@pytest.mark.parametrize(("sigma", "draws"), [(0, 1), (0, 3), (0.1, 1), (0.1, 3)])
@pytest.mark.parametrize("layer", ["conv2", "linear:input"])
def test_traced_glue_gives_the_prediction_of_the_defended_classifier(layer, sigma, draws):
    split = SplitClassifier(small_conv_net(), layer)
    scores = torch.rand(split.num_classes, split.num_neurons)
    defended = DefendedClassifier(
        split, importance_of(split, scores.tolist()), top_k=2, sigma=sigma, num_noise_samples=draws, temperature=0.5
    )

    def inputs(batch):
        pixels = torch.randint(0, 256, (batch, 8, 8, 3), dtype=torch.uint8)
        return (pixels, torch.randn(draws, batch, 3, 8, 8)) if sigma else (pixels,)

    with torch.no_grad():
        examples = inputs(2)
        prologue = traced(Prologue(defended), *examples)
        epilogue = traced(Epilogue(defended), *split.cut(prologue(*examples)))
        for batch in (1, 2, 7, 7, 7, 1, 32):  # more than once, for what torch does after it has seen a shape
            given = inputs(batch)
            rows = epilogue(*split.cut(prologue(*given)))
            expected = defended.predict(to_images(given[0]), *given[1:])
            torch.testing.assert_close(rows[:, 0], expected.logits.softmax(1))
            torch.testing.assert_close(rows[:, 1], expected.undefended_logits.softmax(1))
            torch.testing.assert_close(rows[:, 2], expected.class_weights)
            torch.testing.assert_close(rows[:, 3], expected.logits)
            torch.testing.assert_close(rows[:, 4], expected.undefended_logits)
