"""What is to be inspected: a LongNet's configuration, or what another checkpoint would become."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from conversion.hub import find_folder
from conversion.plan_family import default_config, source_window
from conversion.weights import read_json
from modeling_longnet import LongNetConfig


def read_config(source: str) -> tuple[LongNetConfig, str | None, int | None]:
    """Read a configuration file, the one of a checkpoint folder, or of a model on the Hub; no weights are read.

    Returns:
        The configuration, and of a source that is no LongNet its architecture and sliding window, if it has one: the
        configuration is then the one that ``longnet-convert`` gives it by default.

    Raises:
        ValueError: if there is none, it is malformed, or the source is of a family that cannot be converted.
    """
    path = Path(source)
    if not path.is_file():
        path = find_folder(source, None, ["config.json"])[0] / "config.json"
    fields = read_json(path)
    try:
        if fields.get("model_type") == LongNetConfig.model_type:
            return LongNetConfig.from_dict(fields), None, None
        return *default_config(fields), source_window(fields)
    # A field of a wrong type, a missing part of RoPE, a dtype that torch does not have.
    except (StrictDataclassError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no valid configuration: {error}") from error
