//! One image, a container and virtual machines, booted and born: nobody who looks can
//! tell.

use std::{path::PathBuf, time::Duration};

use qvd_demo::{Setup, rfb::Rfb};
use qvd_testkit::{Need, bed_directory, privileged};
use tokio::{io::DuplexStream, time::timeout};

use crate::harness::{PASSWORD, browser, create_desktop, inside, on_a_host, remove_user, run};

/// As long as a boot by emulation and a first picture take on a host that does
/// much else.
const LOOKS_ALIKE_WITHIN: Duration = Duration::from_secs(150);

/// Pixels in a hundred that clocks, graphs of load and a cursor that blinks may
/// differ in.
const DIFFERENT_PERCENT: usize = 2;

fn different_percent(one: &Rfb<DuplexStream>, other: &Rfb<DuplexStream>) -> usize {
    assert_eq!(one.size(), other.size());
    let (width, height) = one.size();
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let different = places.filter(|&(x, y)| one.pixel(x, y) != other.pixel(x, y)).count();
    (different * 100).div_ceil(usize::from(width) * usize::from(height))
}

#[test]
fn the_same_flavour_looks_the_same_in_a_container_in_a_machine_and_in_one_born_from_a_template() {
    privileged(&[Need::Bed], || {
        on_a_host(|host| {
            let kernel = bed_directory().unwrap().display().to_string();
            let arguments = ["--vm-kernel", &kernel, "--accel", "tcg", "--vm-disk", "2G", "--vm-templates"];
            let arguments = arguments.map(str::to_owned).to_vec();
            let server = Setup { arguments, ..host.setup.clone() }.start().unwrap();
            let user = format!("machine-{}", std::process::id());
            server.add_user(&user, PASSWORD).unwrap();
            // The name is in the prompt of the terminal: of the same length, and read below.
            let container = create_desktop(&server, &user, &["--name", "desk-a"]);
            let machine = ["--virtualizer", "qemu", "--name"];
            let booted = create_desktop(&server, &user, &[&machine[..], &["desk-b", "--persistent"]].concat());
            let born = create_desktop(&server, &user, &[&machine[..], &["desk-c"]].concat());
            let all = [container, booted, born];
            run(async {
                let browser = browser(&server, &user).await;
                let [one, two, three] = all.map(|desktop| browser.open(desktop, 1024, 768));
                let (one, two, three) = tokio::try_join!(one, two, three).unwrap();
                let mut seen = [("container", one), ("booted", two), ("born", three)];
                let alike = timeout(LOOKS_ALIKE_WITHIN, async {
                    loop {
                        for (_, display) in &mut seen {
                            display.rfb.update(false).await.unwrap();
                        }
                        let [(_, one), others @ ..] = &seen;
                        let alike = |rfb| different_percent(&one.rfb, rfb) <= DIFFERENT_PERCENT;
                        if one.rfb.colours() >= 16 && others.iter().all(|(_, other)| alike(&other.rfb)) {
                            return;
                        }
                    }
                });
                let alike = alike.await;
                if let Some(dir) = std::env::var_os("QVD_TEST_OUTPUT").map(PathBuf::from) {
                    std::fs::create_dir_all(&dir).unwrap();
                    for (name, display) in &seen {
                        display.rfb.save_png(&dir.join(format!("{name}.png"))).unwrap();
                    }
                }
                let [(_, one), others @ ..] = &seen;
                let differ = || others.each_ref().map(|(name, other)| (name, different_percent(&one.rfb, &other.rfb)));
                alike.unwrap_or_else(|_| panic!("percent that differ: {:?}", differ()));
                seen.into_iter().for_each(|(_, display)| display.leave());
            });
            // What its system is written to tells whether a machine has booted.
            let about = "hostname; uname -r; cat /proc/1/comm; cat /sys/block/vd*/serial 2>/dev/null; true";
            let [in_container, in_booted, in_born] = all.map(|desktop| inside(&server, desktop, about));
            let kernel = |text: &str| text.lines().nth(1).unwrap().to_owned();
            assert!(in_container.starts_with("desk-a\n"), "{in_container}");
            assert!(in_booted.starts_with("desk-b\n") && in_booted.contains("qvd-root"), "{in_booted}");
            assert!(in_born.starts_with("desk-c\n") && !in_born.contains("qvd-root"), "{in_born}");
            assert_eq!(kernel(&in_booted), kernel(&in_born));
            assert_ne!(kernel(&in_container), kernel(&in_born), "the machines have a kernel of their own");
            remove_user(&server, &user);
            server.stop().unwrap();
        });
    });
}
