"""Where stores are, and who asks: the settings of each store's own tools.

s3     AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; AWS_PROFILE and the files
       ~/.aws/credentials and ~/.aws/config (static keys, region, endpoint_url); roles of containers
       and machines; AWS_REGION, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL
gs     GOOGLE_SERVICE_ACCOUNT (a file), GOOGLE_APPLICATION_CREDENTIALS, gcloud's application
       default credentials; the machine's role
az     AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY or
       AZURE_CLIENT_ID ...; the machine's role
hf     HF_TOKEN, or the token that `hf auth login` keeps; HF_ENDPOINT

obstore reads the environment itself; what it does not read is read here.
"""

from __future__ import annotations

import configparser
import os
from contextlib import suppress
from pathlib import Path

# What obstore takes before the files: the environment's keys, the roles of containers.
_OTHER_WAYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE",
               "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
               "AWS_CONTAINER_CREDENTIALS_FULL_URI")  # fmt: skip
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "HF_", "STORAGE_")


def fingerprint() -> tuple[tuple[str, str], ...]:
    """The settings of the environment: a store that was opened with others is opened again."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(_PREFIXES)))


def aws() -> dict[str, str]:
    """The settings of S3 that obstore does not read itself, by its names for them."""
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    keys = _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    stated = _section(
        "AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"
    )
    settings: dict[str, str] = {}
    both = {**stated, **keys}
    if not any(os.environ.get(name) for name in _OTHER_WAYS) and "aws_access_key_id" in both:
        settings["access_key_id"] = both["aws_access_key_id"]
        settings["secret_access_key"] = both.get("aws_secret_access_key", "")
        if "aws_session_token" in both:
            settings["session_token"] = both["aws_session_token"]
    if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        settings["region"] = both.get("region", "us-east-1")
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or both.get("endpoint_url")
    )
    if endpoint:
        settings["endpoint"] = endpoint
    return settings


def _section(variable: str, name: str, section: str) -> dict[str, str]:
    """A section of one of the files of the AWS tools; empty where there is none."""
    path = Path(os.environ.get(variable) or f"~/.aws/{name}").expanduser()
    parser = configparser.RawConfigParser()
    with suppress(OSError, configparser.Error, UnicodeDecodeError):
        parser.read_string(path.read_text("utf-8"))
    return dict(parser[section]) if parser.has_section(section) else {}


def hub_endpoint() -> str:
    """Where the Hugging Face hub is."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """The token of the hub's user (huggingface_hub 2.4, utils/_auth.py)."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text("utf-8").strip() or None
    return None
