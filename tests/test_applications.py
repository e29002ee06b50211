import pytest

from benchmarks import applications


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV3Small", "EfficientNetB0"])
def test_a_model_of_keras_applications_is_pruned_trained_saved_loaded_wrapped_and_stripped(name):
    result = applications.check(name)
    assert result["result"] == "ok", result
    assert result["prunable"] > 1e6
