"""SECURITY.md promises, and these tests keep it: each promise has a name there, and tests here."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "SECURITY.md").read_text()

PROMISES: dict[str, list[str]] = {
    # A hostile image
    "image-parser": [
        "tests/image/test_fixtures.py::test_bad_images_are_refused_by_name",
        "tests/image/test_scan_bounds.py::test_the_worst_files_cost_little_memory",
        "tests/image/test_scan_bounds.py::test_the_worst_files_cost_little_time",
    ],
    "image-format": ["tests/image/test_scan_backing.py::test_the_format_is_said_or_told_by_the_suffix_never_probed"],
    "image-backing": [
        "tests/image/test_scan_backing.py::test_a_backing_file_elsewhere_needs_its_directory_named",
        "tests/image/test_scan_backing.py::test_a_link_inside_an_allowed_directory_leads_no_further",
        "tests/test_promises.py::test_promise_6_nothing_outside_what_was_named_is_opened",
    ],
    "image-backing-rights": [
        "tests/image/test_scan_backing.py::test_a_backing_file_is_read_only_if_the_overlays_owner_may_read_it",
        "tests/ops/test_layouts.py::test_a_base_that_the_owner_of_the_image_cannot_read",
        "tests/ops/test_layouts.py::test_a_base_that_those_cannot_read_who_may_write_to_an_image_of_root",
    ],
    "image-protocols": ["tests/image/test_scan_backing.py::test_protocols_are_not_followed"],
    "image-tools": [
        "tests/test_architecture.py::test_no_command_runs_qemu_img",
        "tests/image/test_qemu_img.py::test_every_run_is_bounded",
        "tests/host/test_processes.py::test_limits_hold_in_the_child",
    ],
    "image-in-use": [
        "tests/test_promises.py::test_promise_7_nothing_that_somebody_writes_to_is_shipped",
        "tests/host/test_locks.py::test_a_writer_without_locks_is_seen",
    ],
    # A hostile file system in a guest
    "files-child": [
        "tests/files/test_confinement.py::test_what_it_cannot_do",
        "tests/files/test_confinement.py::test_root_becomes_nobody_without_capabilities",
        "tests/files/test_hostile.py::test_a_child_that_was_taken_over_is_an_error",
    ],
    "files-outside": [
        "tests/files/test_hostile.py::test_a_name_that_no_file_can_have_is_skipped",
        "tests/files/test_hostile.py::test_a_file_never_goes_through_a_link_of_the_guest",
        "tests/files/test_hostile.py::test_a_name_that_comes_twice_is_written_once",
    ],
    "files-kinds": [
        "tests/files/test_hostile.py::test_devices_and_set_id_bits_are_not_made",
    ],
    "files-bounds": [
        "tests/files/test_hostile.py::test_mutated_file_systems",
        "tests/files/test_hostile.py::test_a_child_that_reads_for_ever_is_ended",
        "tests/files/test_hostile.py::test_files_of_more_bytes_than_the_limit_are_not_written",
    ],
    # Other users of this host
    "host-rights": [
        "tests/host/test_directory.py::test_whose_rights_a_directory_is_used_with",
        "tests/host/test_rights.py::test_the_kernel_judges_by_the_other_rights_and_by_roots_again",
        "tests/ops/test_layouts.py::test_as_root",
    ],
    "host-owner": ["tests/ops/test_layouts.py::test_as_the_owner_of_the_images"],
    "host-swaps": [
        "tests/ops/test_chosen_places.py::test_nothing_is_changed_where_a_link_of_somebody_else_leads",
        "tests/swaps/test_swaps.py::test_root_is_not_led_astray",
        "tests/swaps/test_swaps.py::test_each_harm_is_seen",
        "tests/swaps/test_swaps.py::test_every_name_is_attacked_and_each_in_every_way",
    ],
    "host-modes": [
        "tests/host/test_directory.py::test_a_mode_beyond_reading_and_writing_is_not_given",
        "tests/host/test_files.py::test_nobody_gets_the_right_to_run_a_file",
        "tests/host/test_files.py::test_an_owner_that_cannot_be_given_is_refused",
    ],
    "host-restore": [
        "tests/ops/test_restore_targets.py::test_every_target_has_its_outcome",
        "tests/ops/test_restore_targets.py::test_a_temporary_name_that_is_taken_is_left_alone",
        "tests/ops/test_restore_targets.py::test_a_lower_file_that_somebody_else_may_have_planted_is_not_taken_up",
    ],
    "host-devices": ["tests/ops/test_restore_targets.py::test_every_target_has_its_outcome"],
    "host-records": [
        "tests/ops/test_planted_records.py::test_a_planted_journal_is_told_and_does_nothing",
        "tests/ops/test_planted_notes.py::test_what_a_note_counts_for_to_root",
        "tests/ops/test_planted_notes.py::test_a_stranger_s_note_changes_nothing_that_root_does",
        "tests/host/test_state_key.py::test_a_mark_is_of_one_key_kind_place_and_text",
    ],
    "host-config": [
        "tests/host/test_trusted.py::test_whoever_else_can_write_or_replace_it_is_named",
        "tests/host/test_trusted.py::test_a_link_of_somebody_else_chooses_none",
        "tests/ops/nightly/test_owners.py::test_a_configuration_that_another_user_can_write_is_refused",
    ],
    "host-journals": [
        "tests/ops/test_planted_records.py::test_no_alteration_of_our_own_is_believed",
        "tests/ops/test_planted_records.py::test_a_journal_of_another_directory_is_not_believed",
        "tests/ops/test_planted_records.py::test_what_took_the_name_of_an_input_stays",
    ],
    "host-private": [
        "tests/cli/test_umask.py::test_nothing_that_a_verb_makes_is_writable_for_others",
        "tests/objects/test_local.py::test_everything_is_private",
        "tests/repository/test_known.py::test_state_is_private_whatever_the_umask",
        "tests/host/test_private.py::test_root_uses_no_state_below_a_directory_of_another_user",
        "tests/host/test_private.py::test_no_link_of_others_chooses_where_root_makes_directories",
    ],
    "host-umask": [
        "tests/cli/test_umask.py::test_nothing_that_a_verb_makes_is_writable_for_others",
        "tests/host/test_hardening.py::test_a_new_file_is_never_writable_for_everybody",
    ],
    "host-terminal": [
        "tests/cli/test_hostile_text.py::test_names_of_files_and_directories",
        "tests/cli/test_hostile_text.py::test_names_of_what_is_changed",
        "tests/cli/test_hostile_text.py::test_labels_and_disks_of_a_plain_store",
        "tests/cli/test_hostile_text.py::test_words_of_a_program",
        "tests/cli/test_hostile_text.py::test_words_of_a_peer",
        "tests/cli/test_hostile_text.py::test_words_of_a_server",
        "tests/cli/test_hostile_text.py::test_the_streams_and_the_console_themselves",
    ],
    "host-paste": ["tests/host/test_terminal.py::test_a_shell_reads_what_was_meant"],
    # A hostile store
    "store-blind": ["tests/test_promises.py::test_promise_8_the_store_sees_no_plaintext_no_hash_of_it_and_no_name"],
    "store-altered": [
        "tests/test_promises.py::test_promise_8_every_altered_byte_is_noticed",
        "tests/repository/test_packs.py::test_every_altered_byte_of_a_pack_is_noticed",
    ],
    "store-moved": [
        "tests/repository/test_crypto.py::test_a_record_opens_only_under_its_name_kind_repository_and_key",
        "tests/repository/test_packs.py::test_a_blob_opens_nowhere_else",
    ],
    "store-swapped": [
        "tests/repository/test_known.py::test_another_repository_at_a_known_address_is_refused_until_it_is_accepted",
        "tests/repository/test_known.py::test_every_spelling_of_a_known_address_is_known",
    ],
    "store-rollback": [
        "tests/repository/test_known.py::test_a_disk_that_lost_its_newest_generation_is_told",
        "tests/repository/test_known.py::test_a_disk_that_vanished_is_told_and_others_are_not_meant",
        "tests/repository/test_known.py::test_a_disk_that_is_not_named_is_told_as_well",
    ],
    "store-state": [
        "tests/repository/test_known.py::test_a_machine_that_knows_nothing_of_an_address_says_so_once",
        "tests/repository/test_known.py::test_state_that_cannot_be_used_is_told_each_time",
        "tests/repository/test_known.py::test_damaged_state_is_told_with_its_file_and_stays_until_it_is_accepted",
    ],
    "store-downgrade": ["tests/repository/test_known.py::test_a_repository_that_stops_being_encrypted_is_refused"],
    "store-slots": [
        "tests/repository/test_keys.py::test_all_planted_slots_together_have_a_budget",
        "tests/repository/test_keys.py::test_hostile_slots_are_refused_at_once",
        "tests/repository/test_keys.py::test_thousands_of_slots_do_not_keep_us_busy",
    ],
    "store-removed-slots": [
        "tests/ops/test_keys.py::test_a_removed_slot_that_is_put_back_opens_nothing_and_is_shown",
        "tests/ops/test_keys.py::test_the_salt_in_another_spelling_is_the_same_salt",
        "tests/ops/test_keys.py::test_an_older_list_is_refused_where_a_newer_one_was_seen",
        "tests/ops/test_keys.py::test_a_removed_slot_under_the_name_that_is_remembered_opens_nothing",
    ],
    "store-bounds": [
        "tests/objects/test_s3_hostile.py::test_an_object_without_end_is_read_no_further_than_its_kind_reaches",
        "tests/objects/test_s3_hostile.py::test_ever_new_tokens_without_names_end",
        "tests/objects/test_s3_hostile.py::test_memory_follows_what_is_kept_and_not_what_is_sent",
        "tests/repository/test_crypto.py::test_a_record_unpacks_to_no_more_than_a_few_times_what_is_stored",
        "tests/objects/test_s3_faults.py::test_a_server_that_does_not_answer",
    ],
    "store-links": [
        "tests/objects/test_local.py::test_a_directory_that_becomes_a_link_while_it_is_looked_for",
        "tests/objects/test_local.py::test_symbolic_links_lead_nowhere",
        "tests/objects/test_local.py::test_root_follows_no_link_that_another_user_could_have_made",
    ],
    # A hostile replica
    "replica-content": [
        "tests/replica/test_lies.py::test_other_bytes_under_our_sources",
        "tests/replica/test_lies.py::test_a_sum_that_the_replica_gives_back_is_not_believed",
        "tests/replica/test_lies.py::test_verify_tells_it",
        "tests/replica/test_lies.py::test_ship_and_send_report_one_content_id",
    ],
    "replica-bounds": [
        "tests/replica/test_asking.py::test_an_endless_answer_is_given_up",
        "tests/replica/test_asking.py::test_points_without_end_are_given_up",
        "tests/replica/test_lies.py::test_an_inventory_that_cannot_be",
        "tests/replica/test_lies.py::test_file_names_of_a_replica_are_judged_as_they_come",
    ],
    "replica-modes": [
        "tests/replica/test_access.py::test_a_replica_is_its_owners_alone",
        "tests/replica/test_access.py::test_a_mode_never_gives_others_anything",
        "tests/replica/test_access.py::test_a_group_by_option",
    ],
    # A hostile sender or receiver of a stream
    "peer-root": [
        "tests/replica/test_asking.py::test_a_root_confines",
        "tests/replica/test_planted.py::test_no_link_is_followed",
    ],
    "peer-allow": [
        "tests/replica/test_permissions.py::test_each_request_needs_its_right",
        "tests/replica/test_permissions.py::test_every_right_is_asked_for_here",
        "tests/replica/test_permissions.py::test_an_append_only_server_loses_nothing",
    ],
    "peer-stream": [
        "tests/replica/test_stream.py::test_a_hostile_sender",
        "tests/replica/test_stream.py::test_a_hostile_receiver",
        "tests/replica/test_stream.py::test_frames_that_claim_too_much_are_not_read",
        "tests/replica/test_bounds.py::test_a_layer_is_refused_before_its_data",
    ],
    "peer-content": [
        "tests/replica/test_planted.py::test_a_transfer_does_not_go_on_in_a_file_that_was_changed",
        "tests/replica/test_order_on_disk.py::test_a_layer_gets_its_name_when_its_bytes_and_its_record_are_on_the_disk",
    ],
    # Masters
    "master-token": [
        "tests/replica/test_masters.py::test_only_the_token_that_is_held_counts",
        "tests/replica/test_masters.py::test_nobody_takes_back_what_is_open",
        "tests/replica/test_masters.py::test_no_sender_ends_a_handover_that_is_in_force",
        "tests/ops/test_planted_notes.py::test_the_token_of_a_handover_is_read_by_nobody_else",
    ],
    "master-epochs": [
        "tests/replica/test_masters.py::test_an_epoch_rises_by_one",
        "tests/replica/test_masters.py::test_an_epoch_that_a_human_names",
    ],
    "master-fenced": [
        "tests/replica/test_epoch.py::test_an_older_epoch_is_refused",
        "tests/replica/test_epoch.py::test_a_saved_stream_of_an_older_epoch",
    ],
    # Secrets
    "secret-places": [
        "tests/cli/test_secrets.py::test_a_passphrase_goes_nowhere",
        "tests/cli/test_secrets.py::test_other_verbs_hand_it_to_nobody",
        "tests/host/test_ssh.py::test_ssh_does_not_see_our_secrets",
    ],
    "secret-file": [
        "tests/host/test_passphrases.py::test_each_mode_has_its_answer",
        "tests/host/test_passphrases.py::test_a_file_of_another_user_is_told",
        "tests/host/test_passphrases.py::test_a_directory_that_everybody_may_write_to_is_refused",
    ],
    "secret-core": [
        "tests/host/test_hardening.py::test_no_core_file_and_no_dump_of_root",
        "tests/host/test_hardening.py::test_the_command_is_hardened_before_it_asks_for_a_passphrase",
        "tests/host/test_processes.py::test_no_core_file",
    ],
    "secret-service": [
        "tests/ops/nightly/test_around.py::test_units_are_what_systemd_takes",
        "tests/ops/nightly/test_around.py::test_a_service_has_the_capabilities_for_the_rights_of_others_and_no_more",
        "tests/ops/nightly/test_around.py::test_a_service_sees_disks_only_where_they_are_images",
    ],
    "secret-argon": [
        "tests/repository/test_keys.py::test_no_slot_is_cheaper_or_much_dearer_than_those_that_are_written"
    ],
    "secret-prompt": [
        "tests/cli/test_key.py::test_init_asks_twice_and_refuses_what_is_guessed_first",
        "tests/cli/test_key.py::test_ctrl_c_at_the_question_is_clean",
        "tests/cli/test_key.py::test_without_a_terminal_nobody_is_asked",
    ],
    "secret-slots": [
        "tests/ops/test_keys.py::test_a_crash_leaves_a_passphrase_that_opens_and_the_next_command_finishes",
        "tests/ops/test_keys.py::test_two_at_once_leave_a_passphrase_that_opens",
        "tests/ops/test_keys.py::test_a_lost_reply_leaves_a_passphrase_that_opens",
    ],
    # Supply chain
    "supply-lock": [
        "tests/test_lock.py::test_every_line_of_a_lock_pins_a_version_or_is_a_hash_of_it",
        "tests/test_lock.py::test_what_pyproject_asks_for_is_pinned",
        "tests/test_lock.py::test_setup_installs_nothing_past_the_locks",
    ],
    "supply-audit": [
        "tests/test_lock.py::test_an_audit_asks_about_every_version_in_the_locks",
        "tests/test_lock.py::test_an_audit_that_got_no_answer_says_so",
    ],
    # All of it
    "all-hostile": ["tests/hostile/test_hostile.py::test_hostile_input_ends_in_a_clear_error_or_the_right_bytes"],
}

_PLAIN = {"What is protected", "Who is trusted with what", "Out of scope", "How to report"}
"""Sections that promise nothing."""


@cache
def named_in(file: str) -> frozenset[str]:
    """Names of the tests of a file, also of those in classes."""
    path = ROOT / file
    found = ast.walk(ast.parse(path.read_bytes())) if path.exists() else ()
    return frozenset(node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def bullets() -> dict[str, list[str]]:
    """Section -> its bullets, each on one line."""
    sections: dict[str, list[str]] = {}
    for section in DOCUMENT.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        parts = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
        sections[title] = [" ".join(part.split("\n\n")[0].split()) for part in parts]
    return sections


def test_every_promise_has_a_name_and_no_name_is_promised_twice() -> None:
    promised = [line for title, lines in bullets().items() if title not in _PLAIN for line in lines]
    names = [re.search(r"\[([a-z]+(?:-[a-z]+)+)\]$", line) for line in promised]
    assert [line for line, name in zip(promised, names, strict=True) if name is None] == []
    assert sorted(name[1] for name in names if name) == sorted(PROMISES)
    assert len(re.findall(r"\[[a-z]+-[a-z-]+\]", DOCUMENT)) == len(PROMISES), "no promise stands in another section"


@pytest.mark.parametrize("name", PROMISES)
def test_every_promise_is_kept_by_tests_that_exist(name: str) -> None:
    assert PROMISES[name]
    missing = [test for test in PROMISES[name] if test.split("::")[1] not in named_in(test.split("::")[0])]
    assert not missing


def test_a_promise_is_a_plain_sentence() -> None:
    for title, lines in bullets().items():
        for line in lines:
            for sentence in re.split(r"(?<=[.:]) ", re.sub(r" \[[a-z-]+\]$", "", line)):
                assert len(sentence.split()) <= 25, (title, sentence)


def test_the_readme_leads_there() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
