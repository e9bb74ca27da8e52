"""The upload of an exported directory, against a stand-in for the hub."""

import pytest

from ngrpo_jax import export, flags


def test_an_upload_makes_a_private_repository_and_names_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *words, **given: calls.append((words, given)))

    def upload_folder(**given):
        calls.append(given)
        return "https://hub/org/name/commit/1"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert export.upload(tmp_path, "org/name", 36).endswith("commit/1")
    assert calls[0] == (("org/name",), {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "org/name", "folder_path": tmp_path, "commit_message": "step 36"}


def test_what_the_hub_refuses_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    def refuses(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuses)
    with pytest.raises(flags.UserError, match=r"cannot be written on the hub \(Token is required\); log in"):
        export.upload(tmp_path, "org/name", 1)


@pytest.mark.parametrize("kind", ["transport", "offline"])
def test_a_hub_that_is_not_reached_is_no_matter_of_rights(tmp_path, monkeypatch, kind):
    import huggingface_hub

    errors = huggingface_hub.errors
    raised = {"transport": errors.HTTPError, "offline": errors.OfflineModeIsEnabled}[kind]

    def fails(*_, **__):
        raise raised("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "create_repo", fails)
    with pytest.raises(flags.UserError) as refusal:
        export.upload(tmp_path, "org/name", 1)
    assert str(refusal.value) == (
        "the hub was not reached ([Errno -2] Name or service not known); check the connection. "
        f"The export is in {tmp_path}."
    )
