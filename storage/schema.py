"""The one place for Arrow schemas: what an index, a part and a finished table hold."""

import pyarrow as pa


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


INDEX_SCHEMA = pa.schema(
    [
        _required("row_id", pa.int64()),  # position in the input, from 0
        _required("custom_id", pa.string()),
        _required("input_hash", pa.string()),  # of prompt or messages, and per-row sampling
        _required("prefix_hash", pa.string()),  # of the first characters: rows to compute together
        _required("length", pa.int64()),  # characters
    ]
)

RESULT_SCHEMA = pa.schema(
    [
        _required("row_id", pa.int64()),
        _required("custom_id", pa.string()),
        _required("input_hash", pa.string()),
        _required("status", pa.string()),  # ok | error
        pa.field("text", pa.string()),
        _required("finish_reason", pa.string()),  # stop | length | error
        _required("prompt_tokens", pa.int32()),
        _required("output_tokens", pa.int32()),
        _required("replayed_tokens", pa.int32()),
        _required("draft_tokens", pa.int32()),
        _required("accepted_tokens", pa.int32()),
        _required("truncated", pa.bool_()),
        pa.field("activations", pa.string()),  # exact | int8; null where nothing was computed
        pa.field("weights", pa.string()),  # stored | int8 | int4; null likewise
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("seed", pa.int64()),
        _required("sampling", pa.string()),  # JSON
        _required("model", pa.string()),
        pa.field("model_revision", pa.string()),
        _required("job", pa.string()),
        _required("run_id", pa.string()),
        pa.field("plan", pa.string()),  # null, like epoch and pipeline, where none was reached
        pa.field("epoch", pa.int32()),
        pa.field("pipeline", pa.int32()),
        pa.field("queued_s", pa.float64()),
        pa.field("prefill_s", pa.float64()),
        pa.field("decode_s", pa.float64()),
        _required("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)

PROMPT_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA,
        pa.field("prompt", pa.string()),
        pa.field("messages", pa.string()),  # JSON
    ]
)
"""What SQL shows of the prompts; the texts are null where the input no longer holds the row."""

JOB_SCHEMA = pa.schema(
    [
        ("job", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("rows", pa.int64()),  # null until the input is set
        ("verified", pa.bool_()),
        ("input", pa.string()),
        ("input_sha", pa.string()),
        ("parts", pa.int64()),
        ("commits", pa.int64()),
        ("fingerprint", pa.string()),  # JSON, like the document
        ("document", pa.string()),
    ]
)

RUN_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("status", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("finished_at", pa.timestamp("us", tz="UTC")),
        ("rows", pa.int64()),
        ("rows_ok", pa.int64()),
        ("rows_failed", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("tokens_per_s", pa.float64()),
        ("rows_per_s", pa.float64()),
        ("plan_id", pa.string()),
        ("epoch", pa.int64()),
        ("planned_at", pa.timestamp("us", tz="UTC")),
        ("planned_rows_per_s", pa.float64()),
        ("planned_tokens_per_s", pa.float64()),
        ("planned_finish_s", pa.float64()),
        ("bound_tokens_per_s", pa.float64()),
        ("binding", pa.string()),
        ("basis", pa.list_(pa.string())),
    ]
)

STAGE_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("pipeline", pa.int64()),
        ("stage", pa.int64()),
        ("node", pa.string()),
        ("first_layer", pa.int64()),
        ("end_layer", pa.int64()),
        ("weights_offloaded", pa.int64()),
        ("kv_offloaded", pa.float64()),
        ("micro_batch_rows", pa.int64()),
        ("in_flight", pa.int64()),
        ("draft_len", pa.int64()),
        ("busy_s", pa.float64()),  # measured; per node, so a node's stages share the figure
        ("frames", pa.int64()),
        ("tokens", pa.int64()),
    ]
)

LINK_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("pipeline", pa.int64()),  # null, like codec, where the plan does not use the link
        ("source", pa.string()),
        ("target", pa.string()),
        ("codec", pa.string()),
        ("latency_s", pa.float64()),
        ("bytes_per_s", pa.float64()),
        ("loss", pa.float64()),
        # The above was measured or decided before the run; what follows the run has seen.
        ("level", pa.string()),  # the codec's, of most activations
        ("frames", pa.int64()),
        ("tokens", pa.int64()),
        ("activation_bytes", pa.int64()),  # before they were coded
        ("payload_bytes", pa.int64()),  # as coded, and token ids
        ("framing_bytes", pa.int64()),
        ("control_bytes", pa.int64()),
        ("ack_bytes", pa.int64()),  # which the target sent back
        ("wire_bytes", pa.int64()),  # all that the source handed to TLS
        ("ratio", pa.float64()),
        ("seen_bytes_per_s", pa.float64()),  # while the link had work
        ("seen_rtt_s", pa.float64()),
        ("seen_loss", pa.float64()),  # of TCP segments
        ("blocked_s", pa.float64()),
        ("frames_waiting", pa.int64()),  # queued or unacknowledged, when the source last said so
        ("most_frames_waiting", pa.int64()),  # at any time
        ("frames_sent_again", pa.int64()),
        ("reconnects", pa.int64()),
        ("congestion_control", pa.string()),
    ]
)

NODE_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("name", pa.string()),
        ("region", pa.string()),
        ("kind", pa.string()),
        ("flop_per_s", pa.float64()),
        ("memory_bytes", pa.float64()),
        ("memory_bytes_per_s", pa.float64()),
        ("host_bytes", pa.float64()),
        ("host_to_device_bytes_per_s", pa.float64()),
        ("disk_bytes_per_s", pa.float64()),
        ("parked_kv_bytes_per_s", pa.float64()),
        ("up_bytes_per_s", pa.float64()),
        ("down_bytes_per_s", pa.float64()),
    ]
)
