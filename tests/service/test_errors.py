"""What is said of errors can be sent, whatever the client wrote."""

import json

import pytest

from service.errors import error_response


@pytest.mark.parametrize("detail", ["no such label: 'Katze, größer'", "no such label: '\ud800'", "a \0 and a \x1b"])
@pytest.mark.parametrize(("path", "member"), [("/classify", "detail"), ("/v2/models/m/infer", "error")])
def test_any_text_can_be_told(path, member, detail):
    response = error_response(path, 422, detail)
    assert json.loads(response.body)[member] == detail
    assert int(response.headers["content-length"]) == len(response.body)


def test_a_number_of_any_size_can_be_told():
    assert json.loads(error_response("/importance", 422, "too much", given=10**30).body)["given"] == 10**30
