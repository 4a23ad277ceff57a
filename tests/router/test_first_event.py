"""A stream that begins with an error is told from one that begins."""

import json

import pytest

from flowprefill_sglang.router.first_event import StreamError, first_document, stream_error


def test_an_error() -> None:
    document = b'{"error":{"message":"max_new_tokens must be at least 0, got -1.","code":400}}'
    assert stream_error(b"data: " + document + b"\n\ndata: [DONE]\n\n") == StreamError(400, document)


@pytest.mark.parametrize(
    ("document", "status"),
    [
        (b'{"error": "odd"}', 400),
        (b'{"error": {"code": "model_not_found"}}', 400),
        (b'{"error": {"code": null}}', 400),
        (b'{"error": {"code": 200}}', 400),
        (b'{"error": {"code": 503}}', 503),
        (b'{"error": {', 400),
    ],
)
def test_the_status_of_an_error(document: bytes, status: int) -> None:
    assert stream_error(b"data: " + document + b"\n\n") == StreamError(status, document)


@pytest.mark.parametrize(
    "answer", [b'data: {"text":"a"}\n\n', b"data: [DONE]\n\n", b"", b'data: {"text":"{"error""}\n\n']
)
def test_no_error(answer: bytes) -> None:
    assert stream_error(answer) is None


def test_the_document_of_an_answer() -> None:
    assert first_document(b'{"a":1}') == b'{"a":1}'
    assert first_document(b'data: {"a":1}\n\ndata: {"b":2}\n\n').strip() == b'{"a":1}'


FAILED = (
    b'data: {"text":"","output_ids":[],"meta_info":{"id":"r","finish_reason":'
    b'{"type":"abort","message":"Decode transfer failed","status_code":%d,"err_type":null}}%s}\n\n'
)


@pytest.mark.parametrize(("status", "kind"), [(500, "server_error"), (400, "invalid_request_error")])
def test_a_request_that_failed_later(status: int, kind: str) -> None:
    found = stream_error(FAILED % (status, b"") + b"data: [DONE]\n\n")
    assert found is not None
    assert found.status == status
    assert json.loads(found.document) == {"error": {"message": "Decode transfer failed", "type": kind, "code": status}}


@pytest.mark.parametrize(
    "answer",
    [
        FAILED % (500, b',"index":1'),  # the other prompts of the batch go on
        FAILED % (0, b""),
        (FAILED % (500, b"")).replace(b"500", b"null"),  # by the client
        (FAILED % (500, b""))[:90],
        b'data: {"text":"to \\"abort\\"","meta_info":{"finish_reason":null}}\n\n',
        b'data: {"text":""abort"","meta_info":{"finish_reason":{"type":"length","length":1}}}\n\n',
    ],
)
def test_an_abort_that_is_no_error(answer: bytes) -> None:
    assert stream_error(answer) is None
