//! Turns of real edges at real continuators, each with a fault: nothing may be lost, said twice, wrong or left hanging.
//!
//! Each worker has an edge, two continuators and a proxy before each. What the large model says comes from an upstream of ours, which
//! continues the one right reply from wherever it is asked to, so that the text on a good day is known to the byte.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use segue_tests::{
    chat::Chat,
    fuzz::Dice,
    programs::{command, machine},
    toxiproxy::{Proxy, Toxiproxy, free_port, http},
    upstream::{self, Step, Upstream, delta, pieces, prefix},
};
use serde_json::json;

const OPENER: &str = "Here is what I know";
/// A turn that takes longer than this hangs.
const HUNG: Duration = Duration::from_secs(60);
/// How long what was used may take to be given back.
const SETTLED: Duration = Duration::from_secs(70);

/// Puts faults before turns and counts what becomes of them.
#[derive(Parser)]
struct Options {
    /// Turns that a fault strikes, at least.
    #[arg(long, default_value_t = 1000)]
    turns: usize,
    /// Workers for faults of the network.
    #[arg(long, default_value_t = 5)]
    workers: usize,
    /// Seed of moments and places of the faults.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Latency,
    Bandwidth,
    Reset,
    HalfOpen,
    SlowClose,
    CutInFrame,
    Refused,
    Killed,
    DiskFull,
    ClockJump,
}

use Fault::{Bandwidth, ClockJump, CutInFrame, DiskFull, HalfOpen, Killed, Latency, Refused, Reset, SlowClose};

const NETWORK: [Fault; 7] = [Latency, Bandwidth, Reset, HalfOpen, SlowClose, CutInFrame, Refused];

impl Fault {
    /// Whether it breaks the connection, so that a turn that it strikes must be resumed.
    fn cuts(self) -> bool {
        !matches!(self, Latency | Bandwidth)
    }

    fn name(self) -> &'static str {
        match self {
            Latency => "latency and jitter",
            Bandwidth => "2 KB/s",
            Reset => "connection reset",
            HalfOpen => "half-open",
            SlowClose => "slow close",
            CutInFrame => "cut in mid-frame",
            Refused => "connections closed and refused",
            Killed => "continuator killed (-9)",
            DiskFull => "disk full for logs, and a reset",
            ClockJump => "clock jump, and a reset",
        }
    }
}

#[derive(Default)]
struct Row {
    turns: usize,
    /// Turns that the fault struck: those that had to be resumed, or were still running when it began.
    struck: usize,
    lost: usize,
    repeated: usize,
    wrong: usize,
    hung: usize,
    slowest: Duration,
}

/// The one right reply to a question.
fn reply_to(question: &str) -> String {
    let number: usize = question.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut text = format!("{OPENER} of question {number}:");
    for n in 0..32 {
        text.push_str(&format!(
            " {}{}",
            ["wörd", "東京", "and", "🎉", "it's"][(number + n) % 5],
            number * 31 + n
        ));
    }
    text + "."
}

async fn upstream() -> Upstream {
    Upstream::start(|_, request| {
        let messages = request["messages"].as_array().expect("messages");
        let question = messages.iter().rev().find(|m| m["role"] == "user").expect("a question");
        let whole = reply_to(question["content"].as_str().expect("text"));
        let said = prefix(request).unwrap_or_default();
        let Some(rest) = whole.strip_prefix(said) else {
            return upstream::error(500, &[], "that is not how the reply begins");
        };
        let mut steps = vec![Step::Send(upstream::head())];
        for piece in pieces(rest) {
            steps.extend([Step::Send(delta(piece)), Step::Wait(Duration::from_millis(9))]);
        }
        steps.push(Step::Send(upstream::end("stop")));
        steps
    })
    .await
}

/// A continuator of a worker's own, which can be killed and started again where it was.
struct Server {
    child: Option<Child>,
    port: u16,
    metrics: u16,
    config: PathBuf,
    world: World,
    tasks: u64,
}

/// What surrounds a worker's programs.
#[derive(Clone, Default)]
struct World {
    full_disk: bool,
    /// The file that says how wrong the clock goes.
    clock: Option<PathBuf>,
}

impl World {
    fn put_around(&self, command: &mut Command) {
        if let (Some(file), Some(library)) = (&self.clock, faketime()) {
            command
                .env("LD_PRELOAD", library)
                .env("FAKETIME_TIMESTAMP_FILE", file)
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        if self.full_disk {
            command.env("SEGUE_LOG", "debug");
        }
        let full = || File::create("/dev/full").map_or_else(|_| Stdio::null(), Stdio::from);
        command.stderr(if self.full_disk { full() } else { Stdio::null() });
    }
}

fn faketime() -> Option<&'static str> {
    let places = [
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
        "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    ];
    places.into_iter().find(|place| Path::new(place).exists())
}

impl Server {
    fn start(config: &Path, world: &World) -> Self {
        let mut this = Self {
            child: None,
            port: free_port(),
            metrics: free_port(),
            config: config.to_owned(),
            world: world.clone(),
            tasks: 0,
        };
        this.run();
        this
    }

    fn run(&mut self) {
        let mut program = command("cloud-continuator");
        program
            .args(["serve", "--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--metrics-listen", &format!("127.0.0.1:{}", self.metrics)])
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        self.world.put_around(&mut program);
        self.child = Some(program.spawn().expect("a continuator starts"));
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(started.elapsed() < HUNG, "a continuator does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(50));
        self.tasks = self.metric("segue_runtime_tasks");
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, text) = http(&format!("127.0.0.1:{}", self.metrics), "GET", "/metrics", "");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.parse().ok())
            .unwrap_or_else(|| panic!("{name} is no metric: {text}"))
    }

    /// What is still in use after a while without edges: streams, turns, and tasks more than at the start.
    fn leaks(&self) -> (u64, u64, u64) {
        let started = Instant::now();
        loop {
            let leaks = (
                self.metric("segue_streams_active"),
                self.metric("segue_turns_active"),
                // Connections to the upstream that are kept for later are no leak; each has a task or two.
                self.metric("segue_runtime_tasks").saturating_sub(self.tasks + 4),
            );
            if leaks == (0, 0, 0) || started.elapsed() > SETTLED {
                return leaks;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Worker {
    name: String,
    faults: Vec<Fault>,
    turns: usize,
    world: World,
    dice: Dice,
}

impl Worker {
    fn run(mut self, toxiproxy: &Arc<Toxiproxy>, config: &Path) -> (BTreeMap<Fault, Row>, (u64, u64, u64)) {
        let mut servers = [(); 2].map(|()| Server::start(config, &self.world));
        let proxies: Vec<Proxy> = servers
            .iter()
            .enumerate()
            .map(|(n, server)| toxiproxy.proxy(&format!("{}-{n}", self.name), &format!("127.0.0.1:{}", server.port)))
            .collect();
        let urls: Vec<String> = proxies
            .iter()
            .map(|proxy| format!("http://{}", proxy.address))
            .collect();
        let opener = format!("--force-opener={OPENER}");
        let args = [
            opener.as_str(),
            "--stall=1s",
            "--resume-within=50s",
            "--history-tokens=200",
            "--offline=never",
        ];
        let start = || Chat::start_with(&urls.join(","), &args, |command| self.world.put_around(command));
        let mut chat = start();
        let mut rows = BTreeMap::<Fault, Row>::new();
        let (mut n, mut struck) = (0, 0);
        // Some faults come a moment too late; those turns are checked, but do not count.
        while struck < self.turns && n < 2 * self.turns + 20 {
            n += 1;
            let fault = self.faults[n % self.faults.len()];
            let question = format!("What of {}", self.dice.below(1000));
            let row = rows.entry(fault).or_default();
            let started = Instant::now();
            row.turns += 1;
            chat.say(&question);
            std::thread::sleep(Duration::from_millis(self.dice.below(220) as u64));
            let early = started.elapsed();
            strike(fault, n, &proxies, &mut servers, &self.world, &mut self.dice);
            let end = chat.end_within(HUNG);
            let took = started.elapsed();
            row.slowest = row.slowest.max(took);
            let Some(end) = end else {
                println!(
                    "  {}: no end; the edge {}",
                    fault.name(),
                    if chat.lives() { "lives" } else { "died" }
                );
                row.hung += 1;
                chat = start();
                continue;
            };
            let (text, right) = (end["text"].as_str().unwrap_or_default(), reply_to(&question));
            let resumed = end["resumed"].as_u64() > Some(0);
            let in_time = end["timings"]["total_ms"].as_f64() > Some(early.as_secs_f64() * 1e3 + 20.0);
            let hit = if fault.cuts() { resumed } else { in_time };
            row.struck += usize::from(hit);
            struck += usize::from(hit);
            if text == right && end["event"] == "end" {
                continue;
            }
            println!("  {}: {end}\n  right: {right}", fault.name());
            if right.starts_with(text) {
                row.lost += 1;
            } else if text.len() > right.len() {
                row.repeated += 1;
            } else {
                row.wrong += 1;
            }
        }
        drop(chat);
        let leaks = servers
            .iter()
            .map(Server::leaks)
            .fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
        (rows, leaks)
    }
}

/// Makes a fault in mid-turn, for as long as it takes effect, and mends it.
fn strike(fault: Fault, n: usize, proxies: &[Proxy], servers: &mut [Server; 2], world: &World, dice: &mut Dice) {
    let pause = |millis| std::thread::sleep(Duration::from_millis(millis));
    let spoil = |toxic: &str, attributes: serde_json::Value| {
        for proxy in proxies {
            proxy.spoil(toxic, "downstream", &attributes);
        }
    };
    match fault {
        Latency => {
            for stream in ["upstream", "downstream"] {
                for proxy in proxies {
                    proxy.spoil("latency", stream, &json!({ "latency": 60, "jitter": 50 }));
                }
            }
            pause(200);
        }
        Bandwidth => {
            spoil("bandwidth", json!({ "rate": 2 }));
            pause(300);
        }
        Reset | DiskFull => {
            spoil("reset_peer", json!({ "timeout": 0 }));
            pause(60);
        }
        HalfOpen => {
            // For longer than the edge waits: it must notice the silence by itself.
            spoil("timeout", json!({ "timeout": 0 }));
            pause(1400);
        }
        SlowClose => {
            // Some more bytes, and then an end that takes its time.
            spoil("limit_data", json!({ "bytes": 1 + dice.below(100) }));
            spoil("slow_close", json!({ "delay": 300 }));
            pause(500);
        }
        CutInFrame => {
            spoil("limit_data", json!({ "bytes": 1 + dice.below(150) }));
            pause(200);
        }
        Refused => {
            proxies.iter().for_each(|proxy| proxy.enable(false));
            pause(dice.below(300) as u64);
            proxies.iter().for_each(|proxy| proxy.enable(true));
        }
        Killed => {
            // The edge is at the one that was not killed the last time.
            servers[n % 2].kill();
            pause(dice.below(100) as u64);
            servers[n % 2].run();
        }
        ClockJump => {
            let offset = ["+3d", "-2d", "+400d", "+0"][n % 4];
            let file = world.clock.as_ref().expect("a world with a clock");
            std::fs::write(file, offset).expect("the clock can be set");
            spoil("reset_peer", json!({ "timeout": 0 }));
            pause(60);
        }
    }
    proxies.iter().for_each(Proxy::heal);
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let Some(toxiproxy) = Toxiproxy::start() else {
        println!("NOT RUN: there is no toxiproxy; tests/bring_toxiproxy.sh builds it and needs Go");
        return ExitCode::FAILURE;
    };
    let upstream = upstream().await;
    let folder = std::env::temp_dir().join(format!("segue-chaos-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder can be written");
    let config = folder.join("continuator.toml");
    let text = format!(
        "[limits]\nturns_per_minute = 0\n[directives]\nverify = false\n[[backend]]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\nmode = \"prefill\"\nwarm_up = false\n",
        upstream.url
    );
    std::fs::write(&config, text).expect("it can be written");

    let special = options.turns / 12;
    let worker = |name: &str, faults: &[Fault], turns, world| Worker {
        name: name.to_owned(),
        faults: faults.to_vec(),
        turns,
        world,
        dice: Dice(options.seed.wrapping_mul(1000) + name.bytes().map(u64::from).sum::<u64>()),
    };
    let mut workers = vec![worker("killed", &[Killed], special, World::default())];
    let full_disk = World {
        full_disk: true,
        clock: None,
    };
    workers.push(worker("disk", &[DiskFull], special, full_disk));
    if faketime().is_some() {
        let clock = folder.join("clock");
        std::fs::write(&clock, "+0").expect("it can be written");
        let world = World {
            full_disk: false,
            clock: Some(clock),
        };
        workers.push(worker("clock", &[ClockJump], special, world));
    } else {
        println!("NOT RUN: clock jumps need libfaketime (apt-get install libfaketime)");
    }
    let rest = options.turns - special * workers.len();
    let each = rest.div_ceil(options.workers.max(1) * NETWORK.len()) * NETWORK.len();
    for n in 0..options.workers.max(1) {
        workers.push(worker(&format!("network{n}"), &NETWORK, each, World::default()));
    }
    let started = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for worker in workers {
        let (toxiproxy, config) = (toxiproxy.clone(), config.clone());
        running.spawn_blocking(move || worker.run(&toxiproxy, &config));
    }
    let (mut rows, mut leaks) = (BTreeMap::<Fault, Row>::new(), (0, 0, 0));
    while let Some(done) = running.join_next().await {
        let (more, leaked) = done.expect("a worker ends well");
        leaks = (leaks.0 + leaked.0, leaks.1 + leaked.1, leaks.2 + leaked.2);
        for (fault, row) in more {
            let sum = rows.entry(fault).or_default();
            sum.turns += row.turns;
            sum.struck += row.struck;
            sum.lost += row.lost;
            sum.repeated += row.repeated;
            sum.wrong += row.wrong;
            sum.hung += row.hung;
            sum.slowest = sum.slowest.max(row.slowest);
        }
    }
    let _ = std::fs::remove_dir_all(folder);

    println!("machine: {}; {:.0} s\n", machine(), started.elapsed().as_secs_f64());
    let line = |name: &str, row: &Row| {
        println!(
            "  {name:<34} {:>6} {:>8} {:>5} {:>9} {:>6} {:>5} {:>9.1}",
            row.turns,
            row.struck,
            row.lost,
            row.repeated,
            row.wrong,
            row.hung,
            row.slowest.as_secs_f64()
        );
    };
    println!(
        "  {:<34} {:>6} {:>8} {:>5} {:>9} {:>6} {:>5} {:>9}",
        "fault", "turns", "struck", "lost", "repeated", "wrong", "hung", "slowest s"
    );
    let mut all = Row::default();
    for (fault, row) in &rows {
        line(fault.name(), row);
        all.turns += row.turns;
        all.struck += row.struck;
        all.lost += row.lost;
        all.repeated += row.repeated;
        all.wrong += row.wrong;
        all.hung += row.hung;
        all.slowest = all.slowest.max(row.slowest);
    }
    line("all", &all);
    println!(
        "\n  left behind in the continuators: {} streams, {} turns, {} tasks",
        leaks.0, leaks.1, leaks.2
    );
    let good = all.lost + all.repeated + all.wrong + all.hung == 0 && leaks == (0, 0, 0) && all.struck >= options.turns;
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
