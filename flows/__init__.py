"""Prefect flows, the command line and the driver: decides what runs; never imports torch."""

import os
import warnings

# Read by Prefect and transformers at their first import, so set before it: a run calls nobody
# but the nodes and servers that its user named. What the user has set stays.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # errors are said once, by the command
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that there is no torch here: there need be none
}.items():
    os.environ.setdefault(_name, _value)

# A home folder that cannot be written is no matter: a run keeps nothing there.
warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
