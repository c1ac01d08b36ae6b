//! Pages of the job list as anybody may send them: a token that no list gave is refused by its field, and changes nothing.

mod support;

use proto::v1;
use proto::v1::jobs_server::Jobs;
use raft_node::api::Api;
use raft_node::leader::Board;
use tonic::{Code, Request, Status};

use support::Group;

async fn list(api: &Api, page: &str) -> Result<v1::ListJobsReply, Status> {
    let request = v1::ListJobsRequest { ended: true, page: page.to_owned(), limit: 2, ..Default::default() };
    api.list_jobs(Request::new(request)).await.map(|reply| reply.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_page_is_refused_and_changes_nothing() {
    let group = Group::of(1).await;
    group.leader().await;
    let api = Api::new(group.replica(0).clone(), Board::default(), "secret");
    for _ in 0..3 {
        let body = v1::Body { argv: vec!["true".to_owned()], ..Default::default() };
        let job = Some(v1::JobSpec { body: Some(body), ..Default::default() });
        let submit = v1::SubmitJobRequest { request_id: proto::request_id(), user: "u".into(), job };
        api.submit_job(Request::new(submit)).await.expect("accepted");
    }
    let before = list(&api, "").await.expect("listed");
    let long = "x".repeat(1 << 20);
    let hostile = [
        "leased",
        "leased-",
        "leased--1",
        "leased-1-2",
        "queued-18446744073709551616",
        "waiting-1e3",
        "archived-",
        "archived-1",
        "archived-4294967296-1",
        "archived-first-1",
        "end-0",
        "../../etc/passwd",
        "\u{0}",
        "\u{1d11e}-1",
        &long,
    ];
    for page in hostile {
        let refused = list(&api, page).await.expect_err(page);
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains("is no page") && refused.message().len() < 1_000, "{refused}");
    }
    // At the edges of the numbers a page is empty, not a fault.
    for page in ["leased-18446744073709551615", "ended-0", "archived-0-0", "archived-4294967295-18446744073709551615"] {
        list(&api, page).await.expect(page);
    }
    assert_eq!(list(&api, "").await.expect("listed"), before);
    group.stop_all().await;
}
